"""Every format and task, from a file as users have it to an adapter, by the command in a process of its own."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tasks import TASKS, make_run
from training.tiny import save_tiny_llama

from peftcli.data.formats import TASK_FORMATS

from .conftest import peft

ANSWERS = {"hello": "world", "how are you": "fine thanks", "what": "the answer is 4", "question": "tool"}
TURNS = ("user", "assistant")
ROWS: dict[str, tuple[str, Callable[[str, str], dict[str, Any]]]] = {
    "chat": (
        "rows.jsonl",
        lambda *qa: {"messages": [{"role": r, "content": c} for r, c in zip(TURNS, qa, strict=True)]},
    ),
    "sharegpt": (
        "rows.json",
        lambda *qa: {"conversations": [{"from": r, "value": c} for r, c in zip(("human", "gpt"), qa, strict=True)]},
    ),
    "prompt_completion": ("rows.parquet", lambda question, answer: {"prompt": question, "completion": answer}),
    "alpaca": ("rows.csv", lambda question, answer: {"instruction": question, "output": answer}),
    "text": ("rows.jsonl.gz", lambda question, answer: {"text": f"{question} {answer}"}),
}
"""Format -> a file of one kind, and a question and its answer as a row of it."""


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match path.suffix:
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case ".csv":
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, list(rows[0]))
                table.writeheader()
                table.writerows(rows)
        case ".gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case _:
            path.write_text(lines)


def train(folder: Path, *arguments: str) -> str:
    """What the command shows; the loss fell, and the files are the trained adapter."""
    shown = peft("train", "recipe.yaml", "--no-audit", *arguments, cwd=folder).stdout
    rows = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    assert json.loads((folder / "run/result.json").read_text())["difference"] < 1e-5
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("name", TASK_FORMATS["CAUSAL_LM"])
def test_every_format_is_detected_and_learnt(name: str, tmp_path: Path) -> None:
    file, row = ROWS[name]
    write(tmp_path / file, [row(*pair) for pair in ANSWERS.items()] * 6)
    save_tiny_llama(tmp_path / "base")
    training = {"output_dir": "run", "per_device_train_batch_size": 4, "max_steps": 60, "learning_rate": 3e-2}
    recipe = {
        "model": {"name_or_path": "base"},
        "adapter": {"method": "lora", "r": 8, "target_modules": "all-linear"},
        "data": {"train": file},
        "training": {**training, "logging_steps": 5},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert f"{file} ({name}" in train(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_learnt(name: str, tmp_path: Path) -> None:
    make_run(name, tmp_path)
    train(tmp_path)
