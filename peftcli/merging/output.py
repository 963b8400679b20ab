"""A new folder that appears whole or not at all, and never where an input lies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peftcli.errors import InputError, RunError, printable

MARKS = ("adapter_config.json", "config.json", "merge.json", "adapter.gguf")
"""Files of which a folder that `--overwrite` may replace has one."""


MAX_NAME = 230
"""Bytes in a folder's name: file systems take 255, and while it is written it has a longer one."""


@contextmanager
def new_folder(target: Path, *, inputs: Sequence[Path], overwrite: bool, size: int) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the `with` ends well.

    Args:
        target: where the result goes.
        inputs: folders that are read.
        overwrite: whether an earlier result there may be replaced.
        size: bytes the result needs, about.

    Raises:
        InputError: if the place can't be used, or the disk is too full.
        RunError: if writing fails.
    """
    target = Path(os.path.abspath(target))
    require_free(target, inputs=inputs, overwrite=overwrite)
    partial = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if size > free:
            raise InputError(f"needs about {size / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free", place=target)
        partial.mkdir()
        yield partial
        _replace(partial, target)
    except OSError as error:
        raise RunError(f"{target}: can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_free(target: Path, *, inputs: Sequence[Path], overwrite: bool) -> None:
    """Refuse a place that is, holds or lies in an input, and one that holds something nobody said to replace."""
    if len(os.fsencode(target.name)) > MAX_NAME:
        raise InputError("has too long a name", place=printable(target), field="--output")
    real = target.resolve()
    for path in (item.resolve() for item in inputs):
        if real == path or path in real.parents or real in path.parents:
            raise InputError(
                "would be written into an input", place=target, field="--output", fix="name another folder"
            )
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError("exists and is no folder", place=target, field="--output")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError("exists", place=target, field="--output", fix="--overwrite replaces it")
    if not any((target / name).is_file() for name in MARKS) or any(item.is_dir() for item in target.iterdir()):
        raise InputError(
            "holds something else than an earlier result, so it is not replaced", place=target, field="--output"
        )


def _replace(partial: Path, target: Path) -> None:
    """Rename; an old folder leaves its place first and is removed last."""
    old = target.with_name(f".old-{target.name}-{os.getpid()}")
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
