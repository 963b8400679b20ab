"""One process that has imported everything, one user's folder, and the run in it that nothing happened to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.nursery import RESUME, Nursery, make_place, outcome


@pytest.fixture(scope="package")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    make_place(folder)
    return folder


@pytest.fixture(scope="package")
def whole(nursery: Nursery, place: Path) -> dict[str, Any]:
    """What the uninterrupted run left, and how many events it took."""
    done = nursery.peft(place, *RESUME)
    assert done["code"] == 0, done["err"]
    left = {**outcome(place / "run"), "events": done["events"], "seconds": done["seconds"]}
    shutil.rmtree(place / "run")
    return left
