"""Fixtures every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftcli.files import CACHE, cache_folder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the tests' own for tokenised data; bases converted earlier are the user's."""
    folder, theirs = tmp_path_factory.mktemp("cache"), cache_folder()
    (theirs / "bases").mkdir(parents=True, exist_ok=True)
    (folder / "bases").symlink_to(theirs / "bases")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(folder))
        yield folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden adapters, the corpus and real data; tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("PEFTCLI_SHARED", PROJECT.parent / "shared")).resolve()
    if not (folder / "golden").is_dir():
        pytest.skip(f"no shared data at {folder} (set PEFTCLI_SHARED)")
    return folder
