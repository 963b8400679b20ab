"""`peft inspect`: what it shows, how it exits, and that it never imports torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from adapter_files import PATH, filled, lora_tensors, safetensors, write_adapter, write_base

from peftcli.cli import main

SHARED = Path(os.environ.get("PEFTCLI_SHARED", Path(__file__).parents[3] / "shared")).resolve()
INDEX = SHARED / "corpus" / "index.json"
ROWS = [row for row in json.loads(INDEX.read_text()) if row["kind"] == "adapter"] if INDEX.is_file() else []

B = PATH.format(layer=0, module="q_proj", name="lora_B.weight")
BAD = {B: filled(float("nan"), 16, 4)}
UNTRAINED = {name: filled(0, *shape) for name, (_, shape, _) in lora_tensors().items() if "lora_B" in name}


class Output:
    """Exit code, what was written, and the JSON in it."""

    def __init__(self, code: int, text: str, errors: str) -> None:
        self.code, self.text, self.errors = code, text, errors

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> Output:
        code = main(["inspect", *map(str, arguments)])
        return Output(code, *capsys.readouterr())

    return run


def test_an_adapter(inspect: Any, tmp_path: Path) -> None:
    shown = inspect(write_adapter(tmp_path))
    assert (shown.code, shown.errors) == (0, "")
    for part in ("LORA", "nobody/no-base", "r 4, lora_alpha 8, scaling 2", "q_proj, v_proj", "4 modules in 2 layers"):
        assert part in shown.text
    assert re.search(r"parameters +448", shown.text)


def test_json(inspect: Any, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", rank_pattern={"v_proj": 4}, lora_dropout=0.1)
    summary = inspect(adapter, "--base", base, "--json", "--tensors", "--norms", "--svd").json
    assert summary["base"]["folder"] == str(base)
    assert summary["options"] == {"lora_dropout": 0.1}
    assert [(row["module"], row["count"], row["out"]) for row in summary["targets"]] == [
        ("q_proj", 2, 16),
        ("v_proj", 2, 8),
    ]
    assert [len(summary[part]) for part in ("rows", "norms", "svd")] == [8, 4, 4]
    assert (summary["errors"], summary["doubts"]) == ([], [])


def test_a_model_and_a_checkpoint_of_a_full_run(inspect: Any, tmp_path: Path) -> None:
    """What `method: full` leaves has no adapter_config.json."""
    run = write_base(tmp_path / "run", architectures=["LlamaForCausalLM"])
    recipe = {"model": {"name_or_path": "the/base"}, "adapter": {"method": "full"}, "data": {"train": "x.jsonl"}}
    (run / "recipe.yaml").write_text(json.dumps(recipe | {"training": {"output_dir": str(run)}}))
    (run / "log.jsonl").write_text('{"step": 5, "loss": 2.5}\n{"step": 9, "loss": 1.25}\n')
    shown = inspect(run)
    assert (shown.code, shown.errors) == (0, "")
    for part in ("LlamaForCausalLM", "in full, from the/base", "1,856", "10 tensors (10 F32)", "loss 2.5 -> 1.25"):
        assert part in shown.text
    assert len(inspect(run, "--json", "--tensors").json["rows"]) == 10
    assert inspect(run, "--check").code == 0

    checkpoint = run / "checkpoint-5"
    checkpoint.mkdir()
    (run / "model.safetensors").rename(checkpoint / "trainable.safetensors")
    assert "in full, from the/base" in inspect(checkpoint).text
    assert "no safetensors files of a model" in inspect(run).errors
    (checkpoint / "trainable.safetensors").write_bytes(safetensors({"lm_head.weight": filled(float("nan"), 4, 4)}))
    bad = inspect(checkpoint, "--check")
    assert bad.code == 1 and "lm_head.weight: holds 16 values that are NaN or infinite" in bad.text


def test_patterns_show_in_the_scaling(inspect: Any, tmp_path: Path) -> None:
    shown = inspect(write_adapter(tmp_path, alpha_pattern={"q_proj": 4}, use_rslora=True))
    assert "scaling 2 to 4" in shown.text


def test_errors_exit_2_after_the_summary(inspect: Any, tmp_path: Path) -> None:
    shown = inspect(write_adapter(tmp_path, lora_tensors() | BAD))
    assert shown.code == 2
    assert "LORA" in shown.text
    assert f"{B}: holds 64 values that are NaN or infinite" in shown.errors
    assert inspect(tmp_path, "--json").json["errors"]


def test_doubts_are_warnings(inspect: Any, tmp_path: Path) -> None:
    shown = inspect(write_adapter(tmp_path, lora_tensors() | UNTRAINED))
    assert shown.code == 0
    assert re.search(r"warning: .*lora_B all zero: untrained", shown.text)


@pytest.mark.parametrize(("tensors", "says"), [(BAD, "NaN or infinite"), (UNTRAINED, "untrained"), ({}, None)])
def test_check(tensors: Any, says: str | None, inspect: Any, tmp_path: Path) -> None:
    shown = inspect(write_adapter(tmp_path, lora_tensors() | tensors), "--check")
    assert shown.code == (1 if says else 0)
    assert (says or "no problems found") in shown.text
    assert "llama.cpp" in shown.text


def test_check_of_what_cannot_be_read(inspect: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, r="4")
    assert inspect(folder, "--check").code == 1
    assert inspect(folder, "--check", "--json").json["problems"]
    assert inspect(tmp_path / "nowhere", "--check").code == 2


CONSUMERS = {
    "plain": ({}, {"PEFT 0.13.0": "ok", "vLLM": "ok", "llama.cpp": "ok"}),
    "rsLoRA": ({"use_rslora": True}, {"vLLM": "ok", "llama.cpp": "would scale modules wrongly"}),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 2}}, {"vLLM": "wrongly", "llama.cpp": "wrongly"}),
    "excluded": ({"exclude_modules": ["x"]}, {"PEFT 0.13.0": "exclude_modules (0.14)"}),
}


@pytest.mark.parametrize(("changes", "verdicts"), CONSUMERS.values(), ids=CONSUMERS)
def test_consumers(changes: dict[str, Any], verdicts: dict[str, str], inspect: Any, tmp_path: Path) -> None:
    said = inspect(write_adapter(tmp_path, **changes), "--check", "--json").json["consumers"]
    for program, verdict in verdicts.items():
        assert verdict in said[program]


def test_a_bare_file(inspect: Any, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors({"x": filled(1.5, 3), "n": ("I64", (), bytes(8))}, {"author": "me"}))
    shown = inspect(path)
    assert (shown.code, "1 F32, 1 I64" in shown.text, "author: me" in shown.text) == (0, True, True)
    assert inspect(path, "--svd").code == 2
    path.write_bytes(safetensors({"x": filled(float("inf"), 3)}))
    assert inspect(path).code == 2
    assert inspect(path, "--check").code == 1


def test_a_recipe(inspect: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {name_or_path: nobody/no-base}\nadapter: {method: lora, r: 12}\n"
        "data: {train: t.jsonl}\ntraining: {output_dir: out}\n"
    )
    shown = inspect(recipe)
    assert (shown.code, "r 12" in shown.text, "nobody/no-base" in shown.text) == (0, True, True)
    assert inspect(recipe, "--json").json["recipe"]["adapter"]["r"] == 12
    recipe.write_text("modle: {}\n")
    shown = inspect(recipe)
    assert (shown.code, "recipe.yaml:1:1" in shown.errors) == (2, True)


def test_a_checkpoint(inspect: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "run" / "checkpoint-20")
    (folder / "trainer.json").write_text(json.dumps({"progress": {"step": 20, "epoch": 1, "best_step": 10}}))
    rows = [{"step": step, "loss": 1.0 / step} for step in (10, 20, 30)]
    (folder.parent / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4')
    assert "step 20, epoch 1, best_step 10, loss 0.1 -> 0.05" in inspect(folder).text
    (folder / "manifest.json").write_text("{}")
    assert inspect(folder, "--check").code == 1


def test_diff_and_plot(inspect: Any, tmp_path: Path) -> None:
    one, two = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two", lora_alpha=16)
    assert "lora_alpha: 8 -> 16" in inspect(one, "--diff", two).text
    picture = tmp_path / "a$b^.png"
    assert inspect(one, "--plot", picture).code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert inspect(one, "--plot", tmp_path / "no" / "folder.png").code == 2
    assert inspect(one, "--plot", tmp_path / "picture.xyz").code == 2


NO_PATHS = ["nowhere", "a\0b", "x" * 5000, "adapter_config.json"]


@pytest.mark.parametrize("path", NO_PATHS)
def test_no_such_path(path: str, inspect: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path)
    shown = inspect(tmp_path / path)
    assert shown.code == 2
    assert len(shown.errors) < 5000


def test_output_is_bounded_and_plain(inspect: Any, tmp_path: Path) -> None:
    tensors = {f"base_model.model.layers.{i}.q_proj.{part}": tensor for i in range(400) for part, tensor in ONE.items()}
    folder = write_adapter(
        tmp_path, tensors, target_modules="all-linear", base_model_name_or_path="\x1b[31m[bold]\u202e"
    )
    shown = inspect(folder, "--tensors", "--norms", "--svd")
    assert shown.code == 0
    assert len(shown.text.encode()) < 65536
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", shown.text)
    assert "[bold]" in shown.text


ONE = {"lora_A.weight": filled(0.5, 4, 3), "lora_B.weight": filled(0.25, 2, 4)}


def test_torch_stays_out(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    code = (
        "import sys\nfrom peftcli.cli import main\n"
        "assert main(['inspect', *sys.argv[1:]]) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), "--tensors"], check=True, capture_output=True)
    subprocess.run([sys.executable, "-c", code, str(folder), "--check"], check=True, capture_output=True)
    with_numpy = code.replace("'numpy', ", "")
    subprocess.run([sys.executable, "-c", with_numpy, str(folder), "--svd", "--norms"], check=True, capture_output=True)


# -- the corpus ---------------------------------------------------------------------------------------------------

NEEDS_BASE = {"ia3_bad_shape"}
"""Nothing in the folder contradicts itself, and it names no base: only the base's sizes show what is wrong."""

OLD_MATHS_IS_KNOWN = {"oft_old_format"}
"""To be refused or read with the old equation, says its note; we do the latter."""


@pytest.mark.parametrize(
    "row", ROWS or [pytest.param(None, marks=pytest.mark.skip("no shared data"))], ids=lambda row: row and row["id"]
)
def test_corpus(row: dict[str, Any], inspect: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = SHARED / "corpus" / row["path"]
    monkeypatch.chdir(path if path.is_dir() else tmp_path)  # so that a module lying there could be imported
    monkeypatch.setenv("NO_COLOR", "1")
    base = ["--base", SHARED / "corpus" / "bases" / "good_base"] if row["id"] in NEEDS_BASE else []
    canary = Path(row["canary"]) if "canary" in row else None
    if canary:
        canary.unlink(missing_ok=True)
    shown = inspect(path, *base)
    text = shown.text + shown.errors
    must = "either" if row["id"] in OLD_MATHS_IS_KNOWN else row["must"]
    assert must == "either" or shown.code == {"accept": 0, "reject": 2}[must]
    if shown.code:
        for alternatives in row["names"]:
            assert any(name.lower() in text.lower() for name in alternatives.split("|"))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)
    assert "Traceback" not in text
    assert len(text.encode()) < 65536
    assert canary is None or not canary.exists()
