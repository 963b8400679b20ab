"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden adapters, the corpus and real data; tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("PEFTCLI_SHARED", PROJECT.parent / "shared")).resolve()
    if not (folder / "golden").is_dir():
        pytest.skip(f"no shared data at {folder} (set PEFTCLI_SHARED)")
    return folder
