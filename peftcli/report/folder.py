"""A folder of report files: each appears whole or not at all, and nobody else's files are touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftcli.errors import InputError, printable
from peftcli.files import write_atomically

FILES = ("report.html", "report.md", "results.json", "metrics.png", "losses.png")


def require_usable(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier report.

    Raises:
        InputError: saying what is in the way.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file, not a folder", place=folder, field="--report")
    others = sorted(path.name for path in folder.iterdir() if path.name not in FILES) if folder.is_dir() else []
    if others:
        raise InputError(
            f"is not empty: {printable(others[0])} is no part of a report",
            place=folder,
            field="--report",
            fix="name a new folder",
        )


def write_json(path: Path, values: Any) -> None:
    write_atomically(path, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
