"""Runs over several machines: what they must agree on, and files of the first that the others may not see.

Machine 0 writes checkpoints and results. The others prepare the same data for themselves (launchers/machines.py) and
need not share a file system: what machine 0 has written and all must read is sent to those that do not find it there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch  # noqa: TID253
from accelerate.utils import broadcast_object_list, gather_object  # noqa: TID253

from peftcli.errors import InputError, InputErrors, printable
from peftcli.launchers.machines import machine_folder
from peftcli.training import checkpoints

BLOCK = 64 << 20
"""Bytes sent at once."""

RECEIVED = "received"
"""In a machine's folder: the copy of a folder of machine 0."""

HASHED = 1 << 20
"""Smaller files are compared by their content, larger ones by their size: a manifest holds the hashes of those."""


def machines() -> int:
    """Over how many machines the launcher has spread this run."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def machine_rank() -> int:
    return int(os.environ.get("GROUP_RANK", "0"))


def require_same(facts: Mapping[str, Any]) -> None:
    """Refuse to train where the machines have prepared different runs. Every process calls this.

    Args:
        facts: by name, whatever all machines must have alike.

    Raises:
        InputErrors: naming each machine that differs from machine 0, and in what.
    """
    if machines() == 1:
        return
    everyone = gather_object([(machine_rank(), dict(facts))])
    _, first = everyone[0]
    differing = {
        (machine, name): values.get(name)
        for machine, values in everyone
        for name in {**first, **values}
        if values.get(name) != first.get(name)
    }
    if differing:
        raise InputErrors(
            InputError(
                f"is {printable(value)}, but {printable(first.get(name))} on machine 0",
                place=f"machine {machine}",
                field=name,
                fix="start all machines with the same recipe, data and packages",
            )
            for (machine, name), value in sorted(differing.items(), key=lambda item: item[0])
        )


def first_says(value: Any) -> Any:
    """The first process's value, in every process of a run over several machines; else each process's own."""
    return value if machines() == 1 else broadcast_object_list([value])[0]


@contextmanager
def seen_here(folder: Path, run_folder: Path) -> Iterator[Path]:
    """A folder that the first process has written, as this machine can read it: itself, or a copy that goes at the end.

    Every process calls this.

    Args:
        folder: where it is on machine 0, and on all machines that share its file system.
        run_folder: the copy goes into this machine's folder there.
    """
    if machines() == 1:
        yield folder
        return
    listing = broadcast_object_list([_listing(folder) if machine_rank() == 0 else None])[0]
    here = _listing(folder) == listing
    if all(gather_object([here])):
        yield folder
        return
    place = machine_folder(run_folder, machine_rank()) / RECEIVED
    writes = not here and os.environ.get("LOCAL_RANK", "0") == "0"
    if writes:
        checkpoints.remove(place)
        place.mkdir()
    for name, size, _ in listing:
        _send(folder / name, place / name if writes else None, size)
    gather_object([None])  # all is written
    yield folder if here else place
    gather_object([None])  # all is read
    if writes:
        checkpoints.remove(place)


def _send(source: Path, target: Path | None, size: int) -> None:
    """A file of the first process; `target` is where this process writes it, if it does."""
    first = torch.distributed.get_rank() == 0
    with ExitStack() as files:
        read = files.enter_context(source.open("rb")) if first else None
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
        write = files.enter_context(target.open("wb")) if target is not None else None
        for _ in range(-(-size // BLOCK)):
            block = broadcast_object_list([read.read(BLOCK) if read else None])[0]
            if write:
                write.write(block)


def _listing(folder: Path) -> list[tuple[str, int, str | None]]:
    """Name, size and, of smaller ones, hash of every file in a folder."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest = sha256(path.read_bytes()).hexdigest() if size < HASHED else None
        found.append((str(path.relative_to(folder)), size, digest))
    return found
