"""A run killed at any moment, resumed with the same command, is the run that was never killed: curve, adapter, files."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from faults.nursery import RESUME, Nursery, outcome

KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)


def survive(nursery: Nursery, place: Path, whole: dict[str, Any], *kills: dict[str, Any]) -> int:
    """Kill one run after another in the same folder, then let one end.

    Returns:
        How many were killed; the last may have ended before it was its turn.
    """
    for name in ("run", "cache"):  # the cache is written to as well
        shutil.rmtree(place / name, ignore_errors=True)
    killed = 0
    for how in kills:
        done = nursery.peft(place, *RESUME, **how)
        if done["code"] not in KILLED:
            assert done["code"] == 0, (kills, done["err"])
            break
        killed += 1
    else:
        done = nursery.peft(place, *RESUME)
        was_done = done["code"] == 2 and "nothing is left to train" in done["err"]
        assert done["code"] == 0 or was_done, (kills, done["err"])
    left = outcome(place / "run")
    assert left == {part: whole[part] for part in left}, kills
    return killed


def spread(events: int, count: int) -> list[int]:
    return sorted({1 + round(number * (events - 1) / (count - 1)) for number in range(count)})


def test_killed_at_some_writes(nursery: Nursery, place: Path, whole: dict[str, Any]) -> None:
    """Three runs, each killed three times on the way: a slice of what the slow suite does."""
    at = [{"event": event} for event in spread(whole["events"], 7)]
    assert survive(nursery, place, whole, at[0], at[1], at[2]) == 3
    assert survive(nursery, place, whole, at[5], {"bytes": 2500}) == 2
    assert survive(nursery, place, whole, at[6]) == 1


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_at_every_write(nursery: Nursery, place: Path, whole: dict[str, Any]) -> None:
    killed = sum(survive(nursery, place, whole, {"event": at}) for at in range(1, whole["events"] + 1))
    assert killed == whole["events"]
    print(f"{killed} kills at every open for writing, fsync, rename and removal: all resumed, all identical")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_inside_writes(nursery: Nursery, place: Path, whole: dict[str, Any]) -> None:
    """The kernel kills whatever writes a file beyond so many bytes, safetensors' own writer among them."""
    sizes = [100, 300, 800, 1200, 1700, 2200, 2600, 3000, 4000, 6000, 9000, 13000, 18000, 25000]
    killed = sum(survive(nursery, place, whole, {"bytes": size}) for size in sizes)
    assert killed >= 10
    print(f"{killed} kills in the middle of a write: all resumed, all identical")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_at_random_moments(nursery: Nursery, place: Path, whole: dict[str, Any]) -> None:
    chance, killed, longest = random.Random(1), 0, whole["seconds"]
    for _ in range(200):
        moments = [{"seconds": chance.uniform(0.1, 1) * longest} for _ in range(5)]
        survived = survive(nursery, place, whole, *moments)
        killed += survived
        if killed >= 40:
            break
        if not survived:  # the machine has become faster since the whole run was timed
            longest *= 0.8
    assert killed >= 40
    print(f"{killed} kills at random moments: all resumed, all identical")
