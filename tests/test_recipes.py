"""Every recipe we ship is valid, and the quickstart's data is what README says it is."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from cli.conftest import peft
from training.tiny import save_tiny_llama

from peftcli.cli import main
from peftcli.recipe.load import dump_recipe, load_recipe

PROJECT = Path(__file__).parents[1]
RECIPES = sorted((PROJECT / "recipes").rglob("*.yaml"))
DATA = PROJECT / "recipes" / "data"


def test_there_are_recipes() -> None:
    assert "quickstart.yaml" in [path.name for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_survives_being_resolved(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(resolved) == recipe


def messages(part: str) -> list[dict[str, str]]:
    """The conversations of one part as `{role: content}`."""
    lines = (DATA / f"quickstart-{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [{turn["role"]: turn["content"] for turn in json.loads(line)["messages"]} for line in lines]


def test_quickstart_data_is_what_the_script_writes(tmp_path: Path) -> None:
    script = PROJECT / "scripts" / "make_quickstart_data.py"
    subprocess.run([sys.executable, script, "--folder", tmp_path], check=True, capture_output=True, timeout=60)
    for part in ("train", "test"):
        name = f"quickstart-{part}.jsonl"
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_quickstart_holds_out_compositions_not_only_sentences() -> None:
    train, test = messages("train"), messages("test")
    assert not {item["user"] for item in train} & {item["user"] for item in test}
    assert not {item["assistant"] for item in train} & {item["assistant"] for item in test}

    def pairs(part: list[dict[str, str]]) -> set[tuple[str, ...]]:
        return {tuple(item["assistant"].split("@")[0].split()) for item in part}  # (verb, service)

    assert not pairs(train) & pairs(test)
    services = {service for _, service in pairs(train)}
    unseen = [item for item in test if item["assistant"].split("@")[0].split()[1] not in services]
    assert len(unseen) == len(test) // 2


def test_the_nl2bash_twin_trains_and_is_evaluated_as_the_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_llama(tmp_path / "base", positions=512)
    monkeypatch.chdir(tmp_path)
    assert (
        main(["train", str(PROJECT / "recipes/nl2bash.yaml"), "model.name_or_path=base", "training.max_steps=2"]) == 0
    )
    data = ["--data", str(DATA / "commands.jsonl"), "--metrics", "loss,exact_match,f1", "--max-new-tokens", "8"]
    assert main(["eval", "out/nl2bash", *data, "--output", "results.json"]) == 0, capsys.readouterr().err
    rows = {row["metric"]: row for row in json.loads((tmp_path / "results.json").read_text())["metrics"]}
    assert set(rows) == {"loss", "exact_match", "f1"} and rows["loss"]["n"] == rows["f1"]["n"] == 8


@pytest.mark.parametrize(
    ("name", "batch", "runs"),
    [
        ("lora-ddp", "1 x 4 accumulated x 8", "2 processes, each with the whole model (DDP)"),
        pytest.param(
            "lora-zero3",
            "1 x 8 accumulated x 4",
            "2 processes share the base (DeepSpeed ZeRO-3)",
            marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the package deepspeed"),
        ),
    ],
)
def test_what_is_for_several_gpus_is_planned_and_its_twin_trained_by_two(
    name: str,
    batch: str,
    runs: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_tiny_llama(tmp_path / "base", positions=1024)
    monkeypatch.chdir(tmp_path)
    twin = ["train", str(PROJECT / f"recipes/{name}.yaml"), "model.name_or_path=base", "training.max_steps=2"]
    source = {"path": str(DATA / "quickstart-train.jsonl"), "max_samples": 64}
    twin += ["model.dtype=auto", "data.max_length=512", "data.eval=null", f"data.train=[{json.dumps(source)}]"]
    assert main([*twin, "--dry-run", "--", "--tee", "3"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"batch {batch} processes" in shown and "memory on cpu" in shown
    assert ("gathered" in shown) == (name == "lora-zero3")
    worker = f"--module peftcli.training.worker {tmp_path / 'out' / name}"
    assert f"ddp.yaml --num_processes {batch[-1]} --tee 3 {worker}" in shown
    assert runs in peft(*twin, "launcher.num_processes=2", cwd=tmp_path).stdout
    result = json.loads((tmp_path / "out" / name / "result.json").read_text())
    assert result["steps"] == 2 and result["difference"] == 0
