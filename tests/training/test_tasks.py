"""Several tasks in one recipe: each source says which it is, and methods that learn several are told row by row."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.families import family
from rich.console import Console

from peftcli.data.prepare import prepare
from peftcli.data.tokens import TokenDataset
from peftcli.recipe.schema import DataSection
from peftcli.training import worker
from peftcli.training.batches import to_batch
from training.run_folders import prepare_run, save_base
from training.tiny import random_data

METHODS: list[dict[str, Any]] = [
    {"method": "poly", "r": 2, "n_tasks": 2, "n_skills": 2, "target_modules": ["q_proj"]},
    {"method": "multitask_prompt_tuning", "num_virtual_tokens": 3, "num_tasks": 2},
]


def test_sources_give_their_task_to_each_sample(tmp_path: Path) -> None:
    for name in ("one", "two"):
        rows = [{"prompt": f"question {name} {i}", "completion": "the answer is 4"} for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataSection.model_validate(
        {
            "train": [
                {"path": str(tmp_path / "one.jsonl"), "weight": 2.0},
                {"path": str(tmp_path / "two.jsonl"), "task": 1},
            ],
            "eval": {"split": 0.3},
        }
    )
    prepared = prepare(section, family("chatml"), folder=tmp_path, seed=0)
    assert prepared.train.tasks is not None
    assert set(prepared.train.tasks.tolist()) == {0, 1}
    loaded = TokenDataset.load(tmp_path / "train.safetensors")
    assert np.array_equal(loaded.tasks, prepared.train.tasks)
    batch = to_batch(loaded, [len(loaded) - 1, 0], 0, torch.device("cpu"))
    assert batch["task_ids"].tolist() == [loaded.tasks[-1], loaded.tasks[0]]


@pytest.mark.parametrize("adapter", METHODS, ids=lambda adapter: adapter["method"])
def test_a_method_of_several_tasks_is_trained_and_resumed(adapter: dict[str, Any], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    folder = prepare_run(tmp_path / "run", base, adapter)
    for name, data in (("train", random_data()), ("eval", random_data(5, seed=1))):
        data.tasks = np.arange(len(data), dtype=np.int64) % 2
        data.save(folder / "data" / f"{name}.safetensors")
    result = worker.run(folder, console=Console(file=io.StringIO()))
    assert result is not None
    assert result.difference < 1e-5
    written = folder / "adapter_model.safetensors"
    before = written.read_bytes()
    written.unlink()
    for path in (folder / "checkpoint-4").iterdir():
        path.unlink()
    (folder / "checkpoint-4").rmdir()
    worker.run(folder, resume="auto", console=Console(file=io.StringIO()))
    assert written.read_bytes() == before


def test_tasks_fit_the_samples() -> None:
    data = random_data(3)
    with pytest.raises(ValueError, match="2 tasks for 3 samples"):
        TokenDataset(data.input_ids, data.supervised, data.offsets, np.zeros(2, np.int64))
