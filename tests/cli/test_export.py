"""`peft export` as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from gguf_files import write
from merging.lab import load_base, save_adapter

from cli.conftest import peft


@pytest.fixture
def adapter(place: Path) -> Path:
    """An adapter on the user's base, which has a tokenizer."""
    return save_adapter(place / "a", place / "base", r=4, use_rslora=True)


def test_merged_and_verified(place: Path, adapter: Path) -> None:
    done = peft("export", "a", "--to", "merged", "-o", "m", "--verify", cwd=place)
    assert "4 changed" in done.stdout
    assert "verified: reloaded, max |difference|" in done.stdout
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (place / "m").iterdir()}
    again = peft("export", "a", "--to", "merged", "-o", "m", cwd=place, code=2)
    assert "--overwrite" in again.stderr
    options = ("--dtype", "bfloat16", "--shard-size", "10kb", "--overwrite", "--verify", "--json")
    result = json.loads(peft("export", "a", "--to", "merged", "-o", "m", *options, cwd=place).stdout)
    assert len(result["files"]) > 1
    assert result["verified"]["difference"] < result["verified"]["bound"]


def name_base(adapter: Path, name: str | None) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))


@pytest.mark.parametrize("form", ["merged", "gguf", "portable"])
def test_the_base_in_a_package_is_found(place: Path, form: str) -> None:
    """As training found it; what is no base of a package is told with what to do."""
    site = shutil.copytree(place / "base", place / "site" / "carries_a_base").parent
    name_base(save_adapter(place / "a", place / "base"), "package:carries_a_base")
    packages = {"PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))}
    done = peft("export", "a", "--to", form, "-o", "m", "--verify", cwd=place, **packages)
    assert "verified: reloaded" in done.stdout
    assert "package:carries_a_base" in peft("inspect", "a", cwd=place, **packages).stdout
    if form != "portable":
        refused = peft("export", "a", "--to", form, "-o", "n", cwd=place, code=2)
        assert "no installed Python package 'carries_a_base'" in refused.stderr
        assert "pip install carries_a_base" in refused.stderr and "--base FOLDER" in refused.stderr


def test_a_gguf_base_is_converted_when_it_is_needed(place: Path) -> None:
    file = write(place / "base.gguf", load_base(place / "base"))
    name_base(save_adapter(place / "a", place / "base"), file.name)
    cache = {"PEFTCLI_CACHE": str(place / "cache")}
    assert "4 changed" in peft("export", "a", "--to", "merged", "-o", "m", cwd=place, **cache).stdout
    assert "llama, found in" in peft("inspect", "a", cwd=place, **cache).stdout


def test_a_base_that_nothing_names(place: Path) -> None:
    name_base(save_adapter(place / "a", place / "base"), None)
    refused = peft("export", "a", "--to", "merged", "-o", "m", cwd=place, code=2)
    assert "does not say which base" in refused.stderr and "--base BASE" in refused.stderr
    assert "--base" in peft("merge", "a", "-o", "m", "--base", "no where", cwd=place, code=2).stderr


def test_portable_and_target(place: Path, adapter: Path) -> None:
    before = peft("export", "a", "--target", "llama.cpp", cwd=place)
    assert "fixable" in before.stdout
    assert "--to portable" in before.stdout
    after = peft("export", "a", "--to", "portable", "-o", "p", "--target", "llama.cpp", "--verify", cwd=place)
    assert "fixable" not in after.stdout
    assert peft("inspect", "p", "--check", cwd=place)


def test_lora_by_energy(place: Path) -> None:
    save_adapter(place / "a", place / "base", "LOHA", r=4)
    done = peft("export", "a", "--to", "lora", "--rank", "0.9", "-o", "l", "--verify", cwd=place)
    assert "of its energy" in done.stdout
    assert "no bound" in done.stdout


def test_clean_copy(place: Path, adapter: Path) -> None:
    peft("export", "a", "--to", "peft", "-o", "c", cwd=place)
    assert peft("inspect", "a", "--diff", "c", cwd=place)


def test_gguf(place: Path, adapter: Path) -> None:
    done = peft("export", "a", "--to", "gguf", "-o", "g", "--verify", cwd=place)
    assert "verified: reloaded, max |difference| of an update" in done.stdout
    assert sorted(path.name for path in (place / "g").iterdir()) == ["Modelfile", "adapter.gguf"]
    refused = peft("export", "a", "--to", "gguf", "-o", "h", "--target", "ollama", cwd=place, code=2)
    assert "--target" in refused.stderr


def test_a_prompt_is_impossible(place: Path, shared: Path) -> None:
    prompt = shutil.copytree(shared / "golden/peft-0.13.0/prompt_tuning/adapter", place / "prompt")
    done = peft("export", prompt, "--target", "vllm", cwd=place, code=1)
    assert "impossible" in done.stdout


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "nothing to do"),
        (["--to", "onnx"], "merged, peft"),
        (["--target", "tgi"], "vllm"),
        (["--to", "merged"], "--output"),
        (["--to", "peft", "--rank", "3", "-o", "x"], "--rank"),
        (["--to", "portable", "--shard-size", "1GB", "-o", "x"], "--shard-size"),
        (["--to", "merged", "--shard-size", "big", "-o", "x"], "5GB"),
        (["--to", "merged", "--base", "nowhere/at/all", "-o", "x"], "nowhere"),
        (["--to", "merged", "-o", "a"], "input"),
        (["b", "--to", "merged", "-o", "x"], "does not exist"),
        (["a", "--to", "lora", "-o", "x"], "peft merge"),
    ],
)
def test_bad_options(place: Path, adapter: Path, options: list[str], problem: str) -> None:
    before = sorted(path.name for path in place.iterdir())
    done = peft("export", "a", *options, cwd=place, code=2)
    assert problem in done.stderr
    assert sorted(path.name for path in place.iterdir()) == before
