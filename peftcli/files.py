"""Reading files that nobody vouches for (regular files only, bounded, JSON taken strictly), and writing whole ones."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from peftcli.errors import InputError, printable

CACHE = "PEFTCLI_CACHE"
"""Environment variable that names the folder of what can be made again; $XDG_CACHE_HOME/peftcli or ~/.cache/peftcli when unset."""
MAX_JSON_BYTES = 8 << 20
MAX_DIGITS = 40  # of an integer in JSON; 2**64 has 20, and Python needs quadratic time for thousands


def cache_folder() -> Path:
    """Where converted bases and tokenised data are kept; it may not exist yet."""
    if chosen := os.environ.get(CACHE):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "peftcli"


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file (or a link to one) for reading, without ever waiting on a pipe or a device.

    Raises:
        InputError: if it is missing, a dangling link, a folder, or no regular file.
    """
    try:
        # O_NONBLOCK: opening a named pipe that nobody writes would hang before it could be looked at.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {_why(path, error)}", place=path) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, device or socket"
        raise InputError(f"is {what}, not a file", place=path)
    return os.fdopen(descriptor, "rb")


def _why(path: Path, error: OSError | ValueError) -> str:
    if isinstance(error, ValueError):
        return "its name holds a NUL character"
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return f"it is a symbolic link to {printable(os.readlink(path))!r}, which does not exist"
    return error.strerror or type(error).__name__


def sha256(path: Path) -> str:
    """Hex digest of a regular file.

    Raises:
        InputError: as `open_regular`.
    """
    digest, block = hashlib.sha256(), bytearray(1 << 20)
    with open_regular(path) as file:
        while count := file.readinto(block):  # type: ignore[attr-defined]  # a buffered reader has it
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows can't open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bounded(path: Path, limit: int) -> bytes:
    """The whole of a regular file of at most `limit` bytes.

    Raises:
        InputError: as `open_regular`, and if it is larger.
    """
    with open_regular(path) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise InputError(f"is larger than {limit:,} bytes", place=path)
    return raw


def read_strict_json(path: Path, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file that nobody vouches for: UTF-8, no duplicate keys, no NaN, bounded size and depth.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    raw = read_bounded(path, limit)
    try:
        values = parse_json(raw)
    except ValueError as error:
        raise InputError(f"is {error}", place=path) from error
    if not isinstance(values, dict):
        raise InputError(f"holds {type(values).__name__}, not an object", place=path)
    return values


def parse_json(raw: bytes) -> Any:
    """The value of one UTF-8 JSON text: no duplicate keys, no NaN or infinity, no endless number, bounded depth.

    Raises:
        ValueError: saying what is wrong, and where in the text or at which key.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_int=_bounded_int)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    _refuse_endless(value)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"not valid JSON: duplicate key {printable(name)!r}")
        result[name] = value
    return result


def _bounded_int(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf


def _refuse_endless(value: Any) -> None:
    """Refuse NaN, Infinity and overflowing numbers (`1e999`), naming the outermost key that holds them."""
    outermost = value.items() if isinstance(value, dict) else [("the text", value)]
    for key, child in outermost:
        stack = [child]
        while stack:
            item = stack.pop()
            if isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"not valid JSON: `{printable(key)}` holds a number that is not finite")
            if isinstance(item, dict):
                stack += item.values()
            elif isinstance(item, list):
                stack += item


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a crash leaves the old one or the new one; a link of that name is replaced, not followed.

    A killed process leaves a `.tmp-0-<pid>-<name>` at worst, which the next run sweeps away.
    """
    temporary = path.with_name(f".tmp-0-{os.getpid()}-{path.name}")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
