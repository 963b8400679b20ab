"""`peft train` over two processes of which one fails: said, with its place, exit code 1, and nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from cli.conftest import command_line

from peftcli.training.checkpoints import checkpoints, damage

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

ENDLESS = ["training.max_steps=1000000", "training.eval_strategy=no", "training.save_strategy=no"]
UNWELL = """
import importlib.machinery, os, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target) if name == "peftcli.training.loop" else None
        if spec is not None:
            load = spec.loader.exec_module

            def load_unwell(module):
                load(module)
                step = module.Trainer._step

                def _step(self, window):
                    if self.progress.step == 3:
                        raise ValueError("the second rank is unwell")
                    return step(self, window)

                module.Trainer._step = _step

            spec.loader.exec_module = load_unwell
        return spec

if os.environ.get("RANK") == "1":
    sys.meta_path.insert(0, Finder)
"""
"""A `sitecustomize` by which the second rank fails in its fourth step."""

DDP = "accelerate"
OTHERS = [
    pytest.param("fsdp", marks=pytest.mark.slow),
    pytest.param(
        "deepspeed",
        marks=[pytest.mark.slow, pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")],
    ),
]
KINDS = [DDP, *OTHERS]


@contextmanager
def started(place: Path, kind: str, **environment: str) -> Iterator[tuple[psutil.Popen, dict[str, psutil.Process]]]:
    """An endless run, with its ranks; whatever of it is left at the end is killed."""
    launcher = f"launcher={{type: {kind}, num_processes: 2}}"
    run = psutil.Popen(
        command_line("train", "recipe.yaml", launcher, *ENDLESS),
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    processes: list[psutil.Process] = []
    try:
        log, deadline = place / "run/log.jsonl", time.monotonic() + 200
        while not log.exists() or not log.read_bytes():
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        processes = run.children(recursive=True)
        yield run, {rank: process for process in processes if (rank := rank_of(process))}
    finally:
        for process in [run, *processes]:
            if process.is_running():
                process.kill()
        run.communicate()


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


def gone(processes: dict[str, psutil.Process]) -> bool:
    """Whether all have ended, within a minute."""
    psutil.wait_procs(processes.values(), timeout=60)
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("killed", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_is_named(kind: str, killed: str, place: Path) -> None:
    """It could say nothing itself; what the other one said of a broken connection is no help."""
    with started(place, kind) as (run, ranks):
        ranks[killed].kill()
        _, said = run.communicate(timeout=100)
        assert run.returncode == 1 and f"rank {killed} was ended by SIGKILL" in said
        assert gone(ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_raises_shows_where(kind: str, place: Path) -> None:
    (place / "modules").mkdir()
    (place / "modules/sitecustomize.py").write_text(UNWELL)
    with started(place, kind, PYTHONPATH=str(place / "modules")) as (run, ranks):
        _, said = run.communicate(timeout=100)
        assert run.returncode == 1 and "rank 1 failed" in said
        assert "in _step" in said and "ValueError: the second rank is unwell" in said
        assert "Traceback (most recent call last)" in (place / "run/rank-1.log").read_text()
        assert gone(ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_whose_run_was_killed_save_and_end(kind: str, place: Path) -> None:
    with started(place, kind) as (run, ranks):
        run.kill()
        assert gone(ranks)
    (left,) = checkpoints(place / "run")
    assert damage(left) is None


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_and_saves(kind: str, number: signal.Signals, place: Path) -> None:
    with started(place, kind) as (run, ranks):
        run.send_signal(number)
        _, said = run.communicate(timeout=100)
        assert run.returncode == 128 + number and f"stopped by {number.name}" in said
        assert gone(ranks)
    (left,) = checkpoints(place / "run")
    assert damage(left) is None
