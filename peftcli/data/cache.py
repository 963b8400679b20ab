"""Tokenised data kept between runs: one folder an entry, named by a hash of all that decides what is in it.

An entry appears whole or not at all: it is written aside, brought to the disk and renamed, so that of two runs at once
the second one's work is dropped. Its files are compared with the hashes in its `entry.json` whenever they are used.
Nothing here can fail a run: without its cache it tokenises again, and says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftcli.data.cache_key import DataKey
from peftcli.data.prepare import AUDIT, TRAIN, WRITTEN, Prepared, prepare
from peftcli.errors import printable
from peftcli.files import cache_folder, flush, write_atomically

MANIFEST = "entry.json"
PARTIAL = ".tmp-"
MAX_BYTES = 10 << 30
"""Of all entries; the least recently used ones go first."""
ABANDONED = 24 * 3600.0  # seconds after which an unfinished entry has no process any more


def prepare_cached(key: DataKey, *, folder: Path, **settings: Any) -> Prepared:
    """What `prepare` makes of `key`'s data, taken from the cache where it was made before.

    Args:
        key: the data and what decides how they are tokenised.
        folder: as for `prepare`, empty.
        settings: the rest of `prepare`'s arguments that decide nothing (`progress`).

    Raises:
        InputError: as `prepare`.
    """

    def anew(said: str) -> Prepared:
        return replace(prepare(key.data, key.tokenizer, folder=folder, **key.arguments, **settings), cache=said)

    if reason := key.useless():
        return anew(f"off: {reason}")
    cache = Cache(cache_folder() / "data")
    name = key.name()
    found, damage = cache.take(name, folder)
    if found:
        return replace(Prepared.load(folder), cache=f"data from cache {cache.root / name}")
    prepared = anew("")
    if key.changed():
        return replace(prepared, cache="not kept: the files changed while they were read")
    said = cache.keep(name, folder)
    return replace(prepared, cache=said + f", in the place of an entry that was damaged: {damage}" * bool(damage))


class Cache:
    """Folders of files in one folder, found by name."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def take(self, name: str, folder: Path) -> tuple[bool, str]:
        """Copy an entry's files into `folder`, if there is such an entry and it is what was written.

        Returns:
            Whether it was; if it was there and damaged, what is wrong. A damaged entry is removed.
        """
        entry = self.root / name
        if not entry.is_dir():
            return False, ""
        try:
            for file, digest in _manifest(entry).items():
                if _copied(entry / file, folder / file) != digest:
                    raise ValueError(f"{file} is not what was written")
            with suppress(OSError):  # not ours to write
                os.utime(entry)  # used now
        except (OSError, ValueError) as error:
            for file in WRITTEN:
                (folder / file).unlink(missing_ok=True)
            if not entry.is_dir():  # another process made room just now
                return False, ""
            with suppress(OSError):
                self._remove(entry)
            return False, printable(error)
        return True, ""

    def keep(self, name: str, folder: Path) -> str:
        """Store the files of `folder` under a name, and make room for them. Returns what to say of it."""
        files = [folder / file for file in WRITTEN if (folder / file).exists()]
        size = sum(file.stat().st_size for file in files)
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)  # it is the user's data
            self._sweep()
            free = shutil.disk_usage(self.root).free
            if size > MAX_BYTES or 2 * size > free:
                return f"not kept: {size:,} bytes, of {MAX_BYTES:,} at most and {free:,} free in {self.root}"
            self._write(name, files)
            self._make_room(name)
        except OSError as error:
            return f"not kept: {printable(error)}"
        return f"kept in {self.root / name}"

    def _write(self, name: str, files: list[Path]) -> None:
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.root))
        try:
            digests = {file.name: _copied(file, partial / file.name) for file in files}
            write_atomically(partial / MANIFEST, json.dumps(digests, indent=1))
            try:
                partial.rename(self.root / name)
            except OSError:
                if not (self.root / name).is_dir():  # else another process was quicker, with the same data
                    raise
            flush(self.root)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """When each entry was last used, its bytes, and its folder."""
        for entry in self.root.iterdir():
            try:
                if not entry.name.startswith(PARTIAL):
                    yield entry.stat().st_mtime, sum(file.stat().st_size for file in entry.iterdir()), entry
            except OSError:  # another process removes it
                continue

    def _make_room(self, name: str) -> None:
        """Remove the least recently used entries until all fit, but not the one just written."""
        entries = sorted(self._entries(), key=lambda entry: (entry[2].name == name, entry[0]))
        total = sum(size for _, size, _ in entries)
        for _, size, entry in entries[:-1]:
            if total <= MAX_BYTES:
                return
            self._remove(entry)
            total -= size

    def _remove(self, entry: Path) -> None:
        """Out of sight first: nobody shall find half an entry."""
        aside = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.root))
        with suppress(OSError):  # gone, or not ours to remove
            entry.rename(aside / entry.name)
        shutil.rmtree(aside, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what processes left that were killed while they wrote."""
        for partial in self.root.glob(f"{PARTIAL}*"):
            if time.time() - partial.stat().st_mtime > ABANDONED:
                shutil.rmtree(partial, ignore_errors=True)


def _manifest(entry: Path) -> dict[str, str]:
    """File name -> its SHA-256."""
    digests = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(digests, dict) or not {TRAIN, AUDIT} <= set(digests) <= set(WRITTEN):
        raise ValueError(f"{MANIFEST} does not name the files")
    return digests


def _copied(source: Path, target: Path) -> str:
    """Copy a file to the disk; its SHA-256."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as write:
        while block := read.read(1 << 20):
            digest.update(block)
            write.write(block)
        write.flush()
        os.fsync(write.fileno())
    return digest.hexdigest()
