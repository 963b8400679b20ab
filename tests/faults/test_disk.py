"""Disks that are too small, and fill up: said with path, needed and free bytes; nothing half-written is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training.tiny import tiny_llama, trainer

from faults.nursery import RESUME, Nursery, outcome
from peftcli.errors import RunError
from peftcli.training import state
from peftcli.training.callbacks import Callback
from peftcli.training.checkpoints import damage, new_checkpoint
from peftcli.training.loop import Trainer
from peftcli.training.reports import StepReport


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root and a kernel that allows it")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Take all but `leave` bytes."""
    filler = folder / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(folder).free - leave)))
    return filler


def test_room_is_looked_for_before_training(small: Path) -> None:
    fill(small, 100_000)
    run = trainer(small, max_steps=20, save_strategy="steps", save_steps=1, save_total_limit=3)
    with pytest.raises(RunError, match=r"small: needs 0\.\d MB for 4 checkpoints of 0\.\d MB each, 0\.1 MB are free"):
        run.train()
    assert [path.name for path in small.iterdir()] == ["filler"]


def test_room_is_looked_for_before_each_save(small: Path) -> None:

    class Fill(Callback):
        def on_step(self, trainer: Trainer, report: StepReport) -> None:
            if report.step == 2:
                fill(small, 50_000)

    values: dict[str, Any] = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    run = trainer(small, tiny_llama(hidden_size=8, vocab_size=97), callbacks=[Fill()], **values)
    with pytest.raises(RunError, match=r"could not be written \(No space left.*needs 0\.\d MB, 0\.0 MB are free"):
        run.train()
    (left,) = small.glob("checkpoint-*")
    assert damage(left) is None
    assert not list(small.glob(".tmp-*"))


@pytest.mark.parametrize("leave", [0, 20_000, 90_000, 260_000])
def test_a_disk_that_fills_up_in_a_save_leaves_nothing(leave: int, small: Path) -> None:
    """Where nobody knew how much was needed: the writers themselves meet the end of the disk."""
    fill(small, leave)
    with pytest.raises(RunError, match=r"could not be written \(No space left on device\)"), \
         new_checkpoint(small, 1, {}) as folder:  # fmt: skip
        state.save_tensors({"a": torch.ones(200, 100)}, folder / "a.safetensors")
        state.save_tensors({"b": torch.ones(500, 100)}, folder / "b.safetensors")
        state.write_trainer(folder, {"random": "0" * 100_000})
    assert [path.name for path in small.iterdir()] == ["filler"]


def test_a_whole_run_on_a_full_disk(nursery: Nursery, place: Path, whole: dict[str, Any], small: Path) -> None:
    """As a user meets it: a message, and the same command goes on once there is room."""
    shutil.rmtree(place / "run", ignore_errors=True)
    (small / "run").mkdir()
    (place / "run").symlink_to(small / "run")
    try:
        filler = fill(small, 60_000)
        done = nursery.peft(place, *RESUME)
        assert done["code"] == 1
        assert "MB are free" in done["err"] and "/run" in done["err"]
        filler.unlink()
        done = nursery.peft(place, *RESUME)
        assert done["code"] == 0, done["err"]
        left = outcome(small / "run")
        assert left == {part: whole[part] for part in left}
    finally:
        (place / "run").unlink()


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """The same end, without a disk of our own: a file may not grow beyond some bytes."""
    script = (
        "import resource, sys, torch\nfrom pathlib import Path\n"
        "from peftcli.training import state\nfrom peftcli.training.checkpoints import new_checkpoint\n"
        "from peftcli.errors import RunError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try:\n    with new_checkpoint(Path(sys.argv[1]), 1, {}) as folder:\n"
        "        state.save_tensors({'a': torch.ones(100, 100)}, folder / 'a.safetensors')\n"
        "except RunError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "could not be written (File too large)" in done.stdout
    assert not list(tmp_path.iterdir())
