"""Two real processes over gloo do what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from training.tiny import random_data, trainer
from training.two_ranks import moved


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(Path(__file__).with_name("two_ranks.py"))
    run = subprocess.run(
        [*command, script, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return {**json.loads((folder / "results.json").read_text()), "folder": folder}


def test_gradients_equal_those_of_one_process(results: dict[str, Any], tmp_path: Path) -> None:
    alone = [
        moved(tmp_path, samples, 8, 1) for samples in (8, 6, 5)
    ]  # 6: a short window; 5: one process has no sample for the last
    for number, vector in enumerate(results["accumulation"]):
        assert vector == pytest.approx(alone[number // 3], rel=1e-9, abs=1e-12)


def test_parameters_that_no_batch_uses_keep_nobody_waiting(results: dict[str, Any], tmp_path: Path) -> None:
    """DDP would average the others' gradients in part only, and say so at the next step, which a last one has not."""
    expected = [0.0] * 5 + moved(tmp_path, 8, 8, 1)
    for vector in results["unused"]:
        assert vector == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_resume_is_bit_identical(results: dict[str, Any]) -> None:
    assert results["resumed"]["same weights"]
    assert results["resumed"]["same log"]
    assert [row["step"] for row in results["resumed"]["rows"]] == [3, 4, 4]


def test_one_process_with_a_nan_stops_both_and_is_named(results: dict[str, Any]) -> None:
    assert "step 1: the loss or its gradient is not finite: batch 1 of process 1" in results["poisoned"]


def test_a_signal_to_one_process_stops_both(results: dict[str, Any]) -> None:
    assert results["signalled"] == 143
    assert (results["folder"] / "signalled" / "checkpoint-2").is_dir()


def test_evaluation_equals_that_of_one_process(results: dict[str, Any], tmp_path: Path) -> None:
    assert results["metrics"] == pytest.approx(trainer(tmp_path).evaluate(random_data(5)), rel=1e-5)
