"""Real signals to a real run: what was asked for is done, the exit code says so, and the checkpoint is whole."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from faults.nursery import RESUME, Nursery, outcome
from peftcli.training.checkpoints import checkpoints, damage

LONG = ("training.num_train_epochs=100000", "training.save_strategy=no", "training.eval_strategy=no")


def test_signals(nursery: Nursery, place: Path) -> None:
    """Each is answered by a saved step and the shell's code; the second SIGINT by leaving at once."""
    cases = [
        ([(signal.SIGTERM, 0)], 143),
        ([(signal.SIGUSR1, 0)], 128 + signal.SIGUSR1),
        ([(signal.SIGINT, 0)], 130),
        ([(signal.SIGINT, 0), (signal.SIGINT, 0.001)], 130),
    ]
    for signals, code in cases:
        shutil.rmtree(place / "run", ignore_errors=True)
        done = nursery.peft(place, *RESUME, *LONG, signals=signals, log=True)
        assert done["code"] == code, (signals, done["err"])
        left = checkpoints(place / "run")
        if len(signals) == 1:
            name = signal.Signals(signals[0][0]).name
            assert f"stopped by {name} after step {left[0].name[11:]}, which was saved" in done["err"]
        assert all(damage(path) is None for path in left)
        assert not [path for path in (place / "run").glob(".tmp-*") if path.is_dir()]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_stopped_at_any_moment(nursery: Nursery, place: Path, whole: dict[str, Any]) -> None:
    """Signals all over a short run, twice and three times: whatever they meet, the same command ends as the whole run."""
    for number in range(24):
        shutil.rmtree(place / "run", ignore_errors=True)
        moment = (number + 1) / 25 * whole["seconds"]
        asked = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1][number % 3]
        signals = [(asked, moment), (signal.SIGINT, moment + 0.05), (signal.SIGINT, moment + 0.06)][
            : 1 + number % 2 * 2
        ]
        done = nursery.peft(place, *RESUME, signals=signals)
        assert done["code"] in (0, 130, 143, 128 + signal.SIGUSR1, -signal.SIGUSR1), (signals, done["err"])
        if done["code"]:
            done = nursery.peft(place, *RESUME)
            assert done["code"] == 0 or "nothing is left to train" in done["err"], (signals, done["err"])
        left = outcome(place / "run")
        assert left == {part: whole[part] for part in left}, signals
