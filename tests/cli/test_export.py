"""`peft export` as a user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from merging.lab import save_adapter

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
