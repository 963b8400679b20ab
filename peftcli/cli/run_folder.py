"""The run folder before the run: may it be used, what an earlier run left in it, and the recipe it is going to hold."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peftcli.errors import InputError, RunError, printable

RECIPE = "recipe.yaml"
DATA = "data"
SWEEP = "sweep"
"""The runs of a sweep of the recipe that names the folder, each with a folder of its own."""
TRAINED = ("checkpoint-*", "adapter_model.safetensors", "model*.safetensors")
"""What a run was made for; a folder without it can be used again."""
WRITTEN = (
    *TRAINED,
    *(
        RECIPE,
        DATA,
        ".tmp-*",
        "adapter_config.json",
        "README.md",
        "result.json",
        "log.jsonl",
        "loss.png",
        "*.log",
        "trackers",
    ),
)
"""Everything a run writes, and so all that `--overwrite` removes."""


def require_usable(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse a folder that holds someone else's files, or another run's work that nobody said to replace.

    Raises:
        InputError: saying which option would help.
    """
    if not folder.exists() or all(path.name == SWEEP for path in folder.iterdir()):
        return
    if not (folder / RECIPE).is_file():
        raise InputError(
            f"is not empty, and no run wrote it (it has no {RECIPE})",
            place=folder,
            field="training.output_dir",
            fix="choose a new folder: --output-dir DIR",
        )
    trained = [path for pattern in TRAINED for path in folder.glob(pattern)]
    if trained and not (overwrite or resume):
        raise InputError(
            f"holds another run's work ({printable(trained[0].name)})",
            place=folder,
            field="training.output_dir",
            fix="--resume auto to continue it, --overwrite to replace it, or --output-dir DIR",
        )


@contextmanager
def created(folder: Path) -> Iterator[None]:
    """Make the folder and its `data/`; what was made and is still empty goes again if the block fails."""
    missing = [path for path in (folder / DATA, folder, *folder.parents) if not path.exists()]
    try:
        (folder / DATA).mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            raise RunError(f"{error.filename or folder}: {error.strerror}") from error
        raise


def clear(folder: Path) -> None:
    """Remove what an earlier run wrote, except the data, which this one has just written. Links are not followed."""
    for path in (path for pattern in WRITTEN for path in folder.glob(pattern) if path.name != DATA):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def kept_if_refused(folder: Path) -> Iterator[None]:
    """Put recipe and data of a run that is to be continued aside, and back if the block refuses to continue it."""
    aside = folder / f".tmp-0-{os.getpid()}"  # named like a checkpoint on its way, so that it is swept up like one
    aside.mkdir()
    for name in (RECIPE, DATA):
        if (folder / name).exists():
            (folder / name).rename(aside / name)
    try:
        yield
    except InputError:
        for path in aside.iterdir():
            _remove(folder / path.name)
            path.rename(folder / path.name)
        raise
    finally:
        shutil.rmtree(aside)


def write_recipe(folder: Path, text: str) -> None:
    """Write the resolved recipe, in one step, and never through a link."""
    temporary = folder / f".{RECIPE}.{os.getpid()}"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / RECIPE)
