"""The run folder before the run: may it be used, what an earlier run left in it, and the recipe and data it gets.

Those are made in a `.tmp-0-<pid>` folder inside and moved into place. `recipe.yaml`, whose first line tells a run folder
from any other, is there from then on and only ever replaced: a run killed at any moment leaves a folder that can be
used again. A folder with a recipe and data of the user's own is none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peftcli.errors import InputError, printable
from peftcli.files import write_atomically
from peftcli.names import RECIPE
from peftcli.training.checkpoints import disk_errors, is_temporary, remove

FIRST_LINE = "# The recipe of this run, resolved. Written by `peft train`."
DATA = "data"
AUDIT = "audit.json"
"""Always in `data` (peftcli.data.prepare)."""
SWEEP = "sweep"
"""The runs of a sweep of the recipe that names the folder, each with a folder of its own."""
MACHINES = "machine-*"
"""What other machines prepare (launchers.machines.machine_folder)."""
TRAINED = ("checkpoint-*", "adapter_model.safetensors", "model*.safetensors")
"""What a run was made for; a folder without it can be used again."""
WRITTEN = (
    *TRAINED,
    *(
        "adapter_config.json",
        "base_fingerprint.json",
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
    others = (SWEEP, *(path.name for path in folder.glob(MACHINES)))
    if not folder.exists() or all(path.name in others or is_temporary(path) for path in folder.iterdir()):
        return
    if not _is_a_runs(folder):
        whose = f"its {RECIPE} or {DATA} are someone's own" if (folder / RECIPE).is_file() else f"it has no {RECIPE}"
        raise InputError(
            f"is not empty, and no run wrote it ({whose})",
            place=folder,
            field="training.output_dir",
            fix="choose a new folder: --output-dir DIR",
        )
    trained = _trained(folder)
    if trained and not (overwrite or resume):
        raise InputError(
            f"holds another run's work ({printable(trained[0].name)})",
            place=folder,
            field="training.output_dir",
            fix="--resume auto to continue it, --overwrite to replace it, or --output-dir DIR",
        )


def _is_a_runs(folder: Path) -> bool:
    """Whether a run wrote the recipe and the data that are there, so that they may be replaced."""
    try:
        with (folder / RECIPE).open("rb") as file:
            written_by_run = file.readline(len(FIRST_LINE) + 2).strip() == FIRST_LINE.encode()
    except OSError:
        return False
    return written_by_run and (not (folder / DATA).exists() or (folder / DATA / AUDIT).is_file())


def _trained(folder: Path) -> list[Path]:
    """What a run was made for, as far as it is there."""
    return [path for pattern in TRAINED for path in folder.glob(pattern)]


@contextmanager
def prepared(folder: Path) -> Iterator[Path]:
    """A temporary folder inside the run folder, with an empty `data/`. It goes at the end, and so do new, empty parents.

    Raises:
        RunError: the disk is full or fails.
    """
    temporary = folder / f".tmp-0-{os.getpid()}"  # named like a checkpoint on its way, so that it is swept up like one
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with disk_errors(folder):
            remove(temporary)
            (temporary / DATA).mkdir(parents=True)
            yield temporary
    finally:
        remove(temporary)
        for path in missing:
            with suppress(OSError):  # in use
                path.rmdir()


@contextmanager
def installed(temporary: Path, folder: Path, recipe: str, *, overwrite: bool) -> Iterator[None]:
    """Put the prepared data and the resolved recipe into the run folder.

    Args:
        temporary: what `prepared` gave.
        recipe: text of `recipe.yaml`, below its first line.
        overwrite: remove what an earlier run wrote. Otherwise its recipe and data come back if the block raises
            InputError, which refuses to continue it. A run that is refused before it trained anything leaves nothing.
    """
    aside = temporary / "before"
    aside.mkdir()
    before = (folder / RECIPE).read_bytes() if (folder / RECIPE).is_file() else None
    logs = set(folder.glob("rank-*.log"))
    if overwrite:
        clear(folder)
    write_atomically(folder / RECIPE, f"{FIRST_LINE}\n{recipe}")
    _exchange(temporary / DATA, folder / DATA, aside)
    try:
        yield
    except InputError:
        if before is not None and not overwrite:
            write_atomically(folder / RECIPE, before)
            _exchange(aside / DATA, folder / DATA, temporary)
            for path in set(folder.glob("rank-*.log")) - logs:  # about the refusal, which has been said
                remove(path)
        elif not _trained(folder):
            clear(folder)
            for name in (RECIPE, DATA):
                remove(folder / name)
        raise


def _exchange(new: Path, place: Path, old: Path) -> None:
    """Move what is at `place` into the folder `old`, and `new` to its place."""
    if place.exists() or place.is_symlink():
        os.rename(place, old / place.name)
    if new.exists():
        os.rename(new, place)


def clear(folder: Path) -> None:
    """Remove what an earlier run wrote, except recipe and data, which are about to be replaced. Links are not followed."""
    for path in (path for pattern in WRITTEN for path in folder.glob(pattern)):
        remove(path)
