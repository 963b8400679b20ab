"""`peft inspect --check`: every problem of an adapter, certain or suspected, in one list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftcli.adapters.audit import audit_folder
from peftcli.errors import InputError, InputErrors
from peftcli.inspection.consumers import consumer_rows
from peftcli.inspection.tensors import tensors_summary
from peftcli.training.checkpoints import MANIFEST, damage


def check_path(path: Path, kind: str, base: Path | None) -> dict[str, Any]:
    """Problems of whatever lies at a path.

    Returns:
        problems: in words, none if all is well; consumers: what other programs make of an adapter.

    Raises:
        InputError: if there is nothing at the path.
    """
    if not path.exists() and not path.is_symlink():
        raise InputError("does not exist", place=path)
    result: dict[str, Any] = {"kind": "check", "path": str(path), "problems": [], "consumers": {}}
    try:
        if kind == "recipe":
            from peftcli.recipe.load import load_recipe

            load_recipe(path)
        elif kind == "tensors":
            summary, _ = tensors_summary(path)
            result["problems"] = summary["errors"] + summary["doubts"]
        elif kind == "model":
            from peftcli.inspection.model import model_problems

            result["problems"] = model_problems(path)
        else:
            audit = audit_folder(path, base=base)
            result["problems"] = [str(problem) for problem in audit.errors + audit.doubts] + _damage(path)
            result["consumers"] = dict(consumer_rows(audit))
    except InputErrors as errors:
        result["problems"] = [str(problem) for problem in errors.problems]
    except InputError as error:
        result["problems"] = [str(error)]
    return result


def _damage(folder: Path) -> list[str]:
    """What a training checkpoint's manifest says has changed since it was written."""
    reason = damage(folder) if (folder / MANIFEST).is_file() else None
    return [f"{folder}: {reason}"] if reason else []
