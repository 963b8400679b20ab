"""Checkpoint folders that are whole or not there at all.

A checkpoint is written as `.tmp-<step>-<pid>/`; its files are flushed to disk, `manifest.json` (size and sha256 of each)
is written last, and one rename makes it `checkpoint-<step>/`. So a run killed at any moment leaves complete checkpoints
and, at worst, a temporary folder that the next run sweeps away. What the manifest doesn't vouch for isn't resumed from.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from peftcli.errors import InputError, RunError, printable
from peftcli.files import flush, parse_json, read_bounded, sha256

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
MAX_MANIFEST_BYTES = 8 << 20

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors that say a disk, a quota or a limit is used up."""

_SYSTEM_ERROR = re.compile(r"os error (\d{1,4})")
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")
_TEMPORARY = re.compile(r"\.tmp-\d{1,15}-(\d{1,10})(-.{1,255})?")


@dataclass(frozen=True)
class Found:
    """The checkpoint to resume from, if any, and those passed over with the reason."""

    folder: Path | None
    skipped: tuple[tuple[Path, str], ...] = ()


# -- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def new_checkpoint(run_folder: Path, step: int, facts: dict[str, Any], *, needed: int = 0) -> Iterator[Path]:
    """A folder to fill; it becomes `checkpoint-<step>` when the block ends well and vanishes when it doesn't.

    Args:
        run_folder: where the run's checkpoints lie.
        step: optimizer steps done.
        facts: further entries of the manifest (recipe hash, versions).
        needed: bytes about to be written, to refuse a full disk beforehand.

    Raises:
        RunError: the disk is full or fails.
    """
    with temporary_folder(run_folder, step, needed=needed) as folder:
        yield folder
        _seal(folder, {"format": MANIFEST_FORMAT, "step": step, **facts})
        target = run_folder / f"checkpoint-{step}"
        if target.exists() or target.is_symlink():  # left over from an attempt that was resumed from an earlier step
            discard(target)
        os.rename(folder, target)
        flush(run_folder)


@contextmanager
def temporary_folder(run_folder: Path, step: int, *, needed: int = 0) -> Iterator[Path]:
    """A `.tmp-<step>-<pid>` folder beside the checkpoints, removed at the end if it is still there.

    Raises:
        RunError: the disk is full or fails, with path, needed and free bytes.
    """
    folder = run_folder / f".tmp-{step}-{os.getpid()}"
    try:
        with disk_errors(run_folder, needed):
            run_folder.mkdir(parents=True, exist_ok=True)
            _require_space(run_folder, needed)
            remove(folder)
            folder.mkdir()
            yield folder
    finally:
        remove(folder)


@contextmanager
def disk_errors(folder: Path, needed: int = 0) -> Iterator[None]:
    """Failures of the disk below `folder` become one message.

    Raises:
        RunError: with the path, and where the disk is full also the bytes that are needed and free.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if type(error).__name__ == "SafetensorError" and (told := _SYSTEM_ERROR.search(str(error))):
            number = int(told[1])  # it has the system's error only in its text
        if number is None:
            raise
        raise _disk_error(number, getattr(error, "filename", None) or folder, folder, needed) from error


def flush_files(folder: Path) -> list[Path]:
    """Give every file below `folder` the modes the umask asks for, flush it to disk, and list them sorted."""
    umask = os.umask(0)
    os.umask(umask)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        path.chmod(0o666 & ~umask)  # safetensors writes 0600
        flush(path)
    for inner in {path.parent for path in files} | {folder}:
        flush(inner)
    return files


def move_files(source: Path, target: Path) -> None:
    """Replace files of `target` by those of `source`, `adapter_config.json` last: without it nothing is an adapter."""
    files = flush_files(source)
    for path in sorted(files, key=lambda path: (path.name == "adapter_config.json", path)):
        destination = target / path.relative_to(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, destination)
    flush(target)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves no half checkpoint: it loses its name first."""
    doomed = checkpoint.with_name(f".tmp-{step_of(checkpoint) or 0}-{os.getpid()}-old")
    remove(doomed)
    os.rename(checkpoint, doomed)
    remove(doomed)


def rotate(run_folder: Path, limit: int | None, keep: Collection[int]) -> None:
    """Delete all but the `limit` latest checkpoints and those of the steps in `keep` (the best, the one just written)."""
    if limit is None:
        return
    latest = [path for path in checkpoints(run_folder) if step_of(path) not in keep]
    for path in latest[max(0, limit - 1) :]:
        discard(path)


def is_temporary(path: Path) -> bool:
    """Whether a folder or file is one that a run was still about to write."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sweep(run_folder: Path) -> None:
    """Remove temporary folders and files of processes that are gone."""
    for path in run_folder.glob(".tmp-*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            remove(path)


def remove(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# -- reading --------------------------------------------------------------------------------------------------------


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint folder's name."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def checkpoints(run_folder: Path) -> list[Path]:
    """The run's checkpoint folders, latest first, valid or not."""
    steps = {path: step_of(path) for path in run_folder.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step is not None), key=lambda path: -(steps[path] or 0))


def find_checkpoint(run_folder: Path, which: str | Path) -> Found:
    """The checkpoint `which` names: a folder, or `auto` for the latest of the run that verifies (or none at all).

    Raises:
        InputError: the named one is damaged, isn't the run's latest, or `auto` finds only damaged ones.
    """
    existing = checkpoints(run_folder)
    if which != "auto":
        return Found(_named_checkpoint(Path(which), run_folder, existing))
    skipped: list[tuple[Path, str]] = []
    for path in existing:
        reason = damage(path)
        if reason is None:
            return Found(path, tuple(skipped))
        skipped.append((path, reason))
    if skipped:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped)
        raise InputError(
            f"no checkpoint can be resumed from ({reasons})",
            place=run_folder,
            fix="start anew with --overwrite",
        )
    return Found(None)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, judged by its manifest, or None if every byte is as it was written."""
    try:
        raw = read_bounded(checkpoint / MANIFEST, MAX_MANIFEST_BYTES)
        manifest = parse_json(raw)
        if manifest["format"] != MANIFEST_FORMAT:
            return f"{MANIFEST} has format {printable(manifest['format'])}; this version reads {MANIFEST_FORMAT}"
        entries = [(str(entry["name"]), int(entry["size"]), str(entry["sha256"])) for entry in manifest["files"]]
        if _manifest({key: value for key, value in manifest.items() if key != "sha256"}) != raw:
            return f"{MANIFEST} has changed since it was written"
    except InputError as error:
        return f"{MANIFEST} {error.problem}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not a manifest"
    for name, size, digest in entries:
        path = checkpoint / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"{MANIFEST} names a file outside the checkpoint"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if sha256(path) != digest:
            return f"{name} has changed since it was written"
    return None


# -- details --------------------------------------------------------------------------------------------------------


def _named_checkpoint(folder: Path, run_folder: Path, existing: list[Path]) -> Path:
    if not (folder / MANIFEST).is_file() and checkpoints(folder):  # a run folder was given
        raise InputError(
            "is a run folder, not a checkpoint",
            place=folder,
            field="--resume",
            allowed="auto, or " + ", ".join(path.name for path in checkpoints(folder)),
        )
    reason = damage(folder)
    if reason is not None:
        raise InputError(f"can't be resumed from: {reason}", place=folder, field="--resume", fix="--resume auto")
    if folder.resolve().parent == run_folder.resolve():
        later = [path.name for path in existing if (step_of(path) or 0) > (step_of(folder) or 0)]
        if later:
            raise InputError(
                f"later checkpoints would mix with the new ones: {', '.join(later)}",
                place=folder,
                field="--resume",
                fix="delete or move them, resume from the latest, or choose another training.output_dir",
            )
    return folder


def _seal(folder: Path, facts: dict[str, Any]) -> None:
    """Flush all files, then vouch for them."""
    files = flush_files(folder)
    entries = [
        {"name": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "sha256": sha256(path)}
        for path in files
    ]
    manifest = folder / MANIFEST
    manifest.write_bytes(_manifest({**facts, "files": entries}))
    flush(manifest)
    flush(folder)


def _manifest(facts: dict[str, Any]) -> bytes:
    """The manifest's bytes: the facts and their own sha256."""
    digest = hashlib.sha256(json.dumps(facts, indent=1).encode()).hexdigest()
    return (json.dumps({**facts, "sha256": digest}, indent=1) + "\n").encode()


def require_room(run_folder: Path, count: int, size: int) -> None:
    """Refuse to begin where `count` checkpoints of `size` bytes don't fit.

    Raises:
        RunError: with path, needed and free bytes.
    """
    with disk_errors(run_folder):
        run_folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run_folder).free
    if free < count * size:
        raise RunError(
            f"{run_folder}: needs {count * size / 1e6:,.1f} MB for {count} checkpoints of {size / 1e6:,.1f} MB each, "
            f"{free / 1e6:,.1f} MB are free: make room, choose another training.output_dir, or lower "
            "training.save_total_limit"
        )


def _require_space(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _disk_error(number: int, place: str | Path, folder: Path, needed: int) -> RunError:
    if number not in FULL:
        return RunError(f"{place}: {os.strerror(number)}")
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    wanted = f"needs {needed / 1e6:,.1f} MB, " if needed else ""
    return RunError(
        f"{place}: could not be written ({os.strerror(number)}): {wanted}{free / 1e6:,.1f} MB are free in {folder}. "
        "Nothing was left half-written; continue with --resume auto once there is room"
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
