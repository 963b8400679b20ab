"""The commands as a user types them, one after another, on a tiny base that this file makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from data.families import family
from training.tiny import tiny_llama

from peftcli.cli import main

RECIPE = """
model: {name_or_path: base}
adapter: {method: lora, r: 4, target_modules: all-linear, lora_dropout: 0.1}
data:
  train: train.jsonl
  eval: {split: 0.25}
training:
  output_dir: run
  per_device_train_batch_size: 4
  num_train_epochs: 4
  learning_rate: 0.02
  eval_steps: 3
  save_steps: 3
  logging_steps: 1
"""
ANSWERS = {"hello": "world", "how are you": "fine thanks", "what": "the answer is 4", "question": "tool"}
Here = Callable[..., str]
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "README.md")


def peft(*arguments: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command; its exit code must be `code`."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-m", "peftcli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data and a recipe."""
    folder = tmp_path_factory.mktemp("user")
    tokenizer = family("chatml")
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lines = [
        json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
        for question, answer in ANSWERS.items()
    ]
    (folder / "train.jsonl").write_text("\n".join(lines * 4) + "\n", encoding="utf-8")
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """The command in this process, which has its imports already; gives what it wrote to stderr."""

    def call(*arguments: str, code: int) -> str:
        monkeypatch.chdir(place)
        assert main(arguments) == code
        return capsys.readouterr().err

    return call


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """The run folder of a finished training."""
    peft("train", "recipe.yaml", cwd=place)
    return place / "run"


def test_a_run_leaves_what_it_promises(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {*ADAPTER, "recipe.yaml", "data", "log.jsonl", "loss.png", "checkpoint-12"} <= names
    assert not [name for name in names if name.startswith(".")], "nothing half-written is left"
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6, 9, 12]


def test_the_same_run_again_writes_the_same_bytes(place: Path, run: Path) -> None:
    peft("train", "recipe.yaml", "--output-dir", "again", cwd=place)
    for name in ADAPTER[:2]:
        assert (place / "again" / name).read_bytes() == (run / name).read_bytes(), name


def test_a_resumed_run_is_the_run_that_was_never_stopped(place: Path, run: Path) -> None:
    """A copy is put back to where it was after step 6."""
    stopped = place / "stopped"
    shutil.copytree(run, stopped)
    for name in (*ADAPTER, "loss.png"):
        (stopped / name).unlink()
    for step in (9, 12):
        shutil.rmtree(stopped / f"checkpoint-{step}", ignore_errors=True)
    kept = {path.name for path in stopped.glob("checkpoint-*")}
    assert "checkpoint-6" in kept
    peft("train", "recipe.yaml", "--output-dir", "stopped", "--resume", "auto", cwd=place)
    for name in ADAPTER[:2]:
        assert (stopped / name).read_bytes() == (run / name).read_bytes(), name


def test_a_folder_with_work_in_it_is_not_overwritten(place: Path, run: Path, here: Here) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    message = here("train", "recipe.yaml", code=2)
    assert "--resume auto" in message and "--overwrite" in message
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_eval_compares_base_and_adapter(place: Path, run: Path) -> None:
    arguments = (
        "--data",
        "test.jsonl",
        "--metrics",
        "loss,perplexity,exact_match,contains",
        "--output",
        "results.json",
    )
    shown = peft("eval", "run", *arguments, cwd=place)
    results = json.loads((place / "results.json").read_text(encoding="utf-8"))
    rows = {row["metric"]: row for row in results["metrics"]}
    assert list(rows) == ["loss", "perplexity", "exact_match", "contains"]
    loss = rows["loss"]
    assert loss["adapters"]["tuned"]["value"] < loss["base"]["value"] and loss["n"] == len(ANSWERS)
    assert [item["expected"] for item in results["items"]] == [[answer] for answer in ANSWERS.values()]
    assert "exact_match" in shown.stdout and "Samples" in shown.stdout
    assert "samples were trained on" in shown.stderr


def test_eval_fails_below_a_threshold(run: Path, here: Here) -> None:
    message = here("eval", "run", "--metrics", "loss", "--fail-under", "loss=0.0001", code=1)
    assert "loss is" in message and "at most 0.0001" in message
    here("eval", "recipe.yaml", "--metrics", "loss", "--fail-under", "loss=1000", code=0)


def test_inspect_knows_what_was_trained(place: Path, run: Path) -> None:
    facts = peft("inspect", "run", "--json", cwd=place).stdout
    assert "LORA" in facts and json.loads(facts)
    peft("inspect", "run/checkpoint-12", cwd=place)
    peft("inspect", "recipe.yaml", cwd=place)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.learning_rte=1", "learning_rate"),
        ("data.train=missing.jsonl", "missing.jsonl"),
        ("adapter.target_modules=[nothing_like_this]", "nothing_like_this"),
        ("data.max_length=4", "max_length"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(tmp_path: Path, here: Here, change: str, message: str) -> None:
    refused = tmp_path / "refused"
    assert message in here("train", "recipe.yaml", change, "--output-dir", str(refused), code=2)
    assert not refused.exists()
