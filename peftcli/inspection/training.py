"""What the files beside an adapter tell of its training: `trainer.json`, `log.jsonl`. All of them optional, none trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftcli.errors import InputError
from peftcli.files import parse_json, read_bounded, read_strict_json

TRAINER, LOG = "trainer.json", "log.jsonl"
MAX_LOG_BYTES = 32 << 20


def training_facts(folder: Path) -> dict[str, Any]:
    """Step, losses and the like; empty where nothing is known.

    Args:
        folder: of an adapter: a finished run's, or one of its checkpoints.
    """
    facts: dict[str, Any] = {}
    try:
        if (folder / TRAINER).is_file():
            facts |= _progress(read_strict_json(folder / TRAINER))
        for log in (folder / LOG, folder.parent / LOG):
            if log.is_file():
                return facts | _losses(log, facts.get("step"))
    except InputError as error:
        facts["unreadable"] = str(error)
    return facts


def _progress(content: dict[str, Any]) -> dict[str, Any]:
    progress = content.get("progress")
    wanted = ("step", "epoch", "tokens", "best_step", "best_value")
    return {name: progress[name] for name in wanted if name in progress} if isinstance(progress, dict) else {}


def _losses(path: Path, step: int | None) -> dict[str, Any]:
    """First and last training and evaluation losses up to a step."""
    rows = []
    for line in read_bounded(path, MAX_LOG_BYTES).split(b"\n"):
        try:
            row = parse_json(line) if line else None
        except ValueError:
            continue  # a killed run may leave half a line
        if isinstance(row, dict) and isinstance(row.get("step"), int) and (step is None or row["step"] <= step):
            rows.append(row)
    facts: dict[str, Any] = {"step": rows[-1]["step"]} if rows else {}
    for name in ("loss", "eval_loss"):
        values = [row[name] for row in rows if isinstance(row.get(name), float)]
        if values:
            facts[name] = [values[0], values[-1]]
    return facts
