"""The same run in one process and in two, under any strategy, and what it came to compared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training.run_folders import prepare_run, save_base

Launcher = dict[str, Any]
DDP: Launcher = {"type": "accelerate", "num_processes": 2}
FSDP: Launcher = {"type": "fsdp", "num_processes": 2}
LORA = {"method": "lora", "r": 4, "target_modules": ["q_proj", "up_proj"]}


@dataclass(frozen=True)
class Row:
    """A run to compare: in one process with a batch of 4, or in two with batches of 2."""

    adapter: dict[str, Any]
    base: str = "float32"
    quantization: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def prepare(self, folder: Path, base: Path, launcher: Launcher, batch: int = 2) -> None:
        prepare_run(
            folder, base, self.adapter, quantization=self.quantization, launcher=launcher, group_by_length=False,
            per_device_train_batch_size=batch, **self.training,
        )  # fmt: skip

    def prepare_alone(self, folder: Path, base: Path) -> None:
        self.prepare(folder, base, {"type": "none"}, 4)


def save_bases(folder: Path) -> dict[str, Path]:
    return {
        "float32": save_base(folder / "float32"),
        "bfloat16": save_base(folder / "bfloat16", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128),
        "tied": save_base(folder / "tied", tie_word_embeddings=True),
    }


def run_in_two(folder: Path, runs: list[tuple[str, str | None]], *, timeout: int = 400) -> None:
    """The worker of each (run folder, checkpoint to resume), one after another in the same two processes."""
    (folder / "runs.json").write_text(json.dumps(runs))
    in_two_processes("worker_ranks.py", folder, timeout=timeout)


def in_two_processes(script: str, folder: Path, *, timeout: int = 400) -> None:
    """A script of this folder, started by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(script)), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def copy_checkpoint(source: Path, target: Path, step: int = 2) -> None:
    """Let `target` be a run that was stopped where `source` stood at a step."""
    shutil.copytree(source / f"checkpoint-{step}", target / f"checkpoint-{step}")
    shutil.copy(source / "log.jsonl", target / "log.jsonl")


def log(folder: Path) -> list[dict[str, float]]:
    assert not (folder / "error.txt").exists(), (folder / "error.txt").read_text()
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors"
    return load_file(folder / (name if (folder / name).exists() else "model.safetensors"))


def assert_equal(one: Path, other: Path, *, losses: float = 1e-5, values: float = 1e-4) -> None:
    for theirs, ours in zip(log(one), log(other), strict=True):
        for name in theirs.keys() & {"loss", "grad_norm", "eval_loss"}:
            # Norms may be large: a sum in another order rounds in their last digits.
            rounding = 2e-5 if name == "grad_norm" else None
            assert ours[name] == pytest.approx(theirs[name], abs=losses, rel=rounding), name
    expected, saved = weights(one), weights(other)
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor, atol=values, rtol=0, msg=name)


def assert_same_end(one: Path, other: Path, step: int = 4) -> None:
    """Two runs came to the same checkpoint, bit for bit."""
    assert (one / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()
    for file in ("trainable.safetensors", "optimizer.safetensors"):
        path = Path(f"checkpoint-{step}") / file
        assert (one / path).read_bytes() == (other / path).read_bytes(), file
    ended, straight = (json.loads((run / f"checkpoint-{step}/trainer.json").read_text()) for run in (one, other))
    for content in (ended, straight):
        del content["progress"]["seconds"]
    assert ended == straight
