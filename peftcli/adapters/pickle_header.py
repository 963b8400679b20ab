"""Names, shapes and dtypes of a torch `.bin` file, without torch and without unpickling.

A `.bin` is a zip of a pickle and one member for each storage. The pickle is stepped through by `pickle_program`; then
each tensor's place is checked against what the archive really holds, before any byte of a storage is read.
"""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from peftcli.adapters.header import BITS, MAX_NAME, TensorFile, TensorInfo
from peftcli.adapters.pickle_program import StoredTensor, run_pickle
from peftcli.errors import InputError, printable
from peftcli.files import open_regular

MAX_PICKLE_BYTES = 32 << 20
MAX_MEMBERS = 100_000


def read_pickle_header(path: Path) -> TensorFile:
    """What `torch.load` would find in the file.

    Raises:
        InputError: if the file is no such archive, or holds anything but a flat dict of plain tensors.
    """
    with open_regular(path) as file:
        try:
            archive = Archive(file)
            state = run_pickle(archive.content("data.pkl", MAX_PICKLE_BYTES))
            tensors = [_locate(name, value, archive) for name, value in _flat_dict(state).items()]
        except (ValueError, zipfile.BadZipFile, NotImplementedError, OSError, EOFError, struct.error) as error:
            raise InputError(
                f"is refused: {printable(error)}",
                place=path,
                fix="ask for the adapter as safetensors; a pickle can run code when it is loaded",
            ) from error
    return TensorFile(path, archive.size, {tensor.name: tensor for tensor in tensors})


class Archive:
    """The zip torch writes: every member under one folder and stored plainly, so that none can swell.

    Raises:
        ValueError, zipfile.BadZipFile: for any other file.
    """

    def __init__(self, file: BinaryIO) -> None:
        if file.read(1) == b"":
            raise ValueError("it is empty (0 bytes)")
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no zip archive (cut short, or a bare pickle older than torch 1.6)")
        self.file, self.size = file, file.seek(0, 2)
        self.members: dict[str, zipfile.ZipInfo] = {}
        entries = zipfile.ZipFile(file).infolist()
        if len(entries) > MAX_MEMBERS:
            raise ValueError(f"it has {len(entries):,} members")
        for entry in entries:
            _, slash, name = entry.filename.partition("/")
            if not slash or name in self.members:
                raise ValueError(f"it has an unexpected member {printable(entry.filename)!r}")
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise ValueError(f"the member {printable(entry.filename)!r} is compressed; torch stores plainly")
            self.members[name] = entry
        if "data.pkl" not in self.members:
            raise ValueError("it holds no `data.pkl`")
        if "byteorder" in self.members and self.content("byteorder", 16) != b"little":
            raise ValueError("its numbers are not little-endian")

    def content(self, name: str, limit: int) -> bytes:
        size = self.members[name].file_size
        if size > limit:
            raise ValueError(f"the member {name!r} has {size:,} bytes")
        self.file.seek(self.start(name))
        return self.file.read(size)

    def start(self, name: str) -> int:
        """Where a member's bytes begin: after its local header, name and padding."""
        offset = self.members[name].header_offset
        self.file.seek(offset)
        signature, name_length, extra_length = struct.unpack("<4s22xHH", self.file.read(30))
        if signature != b"PK\x03\x04":
            raise ValueError("its directory points to no member")
        start: int = offset + 30 + name_length + extra_length
        if start + self.members[name].file_size > self.size:
            raise ValueError(f"the member {name!r} reaches beyond the file")
        return start


def _flat_dict(state: Any) -> dict[str, StoredTensor]:
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not a dict of tensors")
    for name, value in state.items():
        if len(name) > MAX_NAME:
            raise ValueError(f"it has a name of {len(name):,} characters")
        if not isinstance(value, StoredTensor):
            raise ValueError(f"its entry {printable(name)!r} is a {type(value).__name__}, not a tensor")
    return state


def _locate(name: str, tensor: StoredTensor, archive: Archive) -> TensorInfo:
    """Where a tensor's bytes lie, once its storage and extent are known to be what the archive holds."""
    storage, member = tensor.storage, f"data/{tensor.storage.key}"
    itemsize = BITS[storage.dtype] // 8
    held = archive.members[member].file_size if member in archive.members else None
    if held != storage.numel * itemsize:
        raise ValueError(
            f"{printable(name)} declares a storage of {storage.numel:,} x {itemsize} bytes; the archive holds "
            + ("none" if held is None else f"{held:,} bytes")
        )
    count = math.prod(tensor.shape)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in steps) if count else 0
    if tensor.offset + extent > storage.numel:
        raise ValueError(f"{printable(name)} reaches beyond its storage")
    start = archive.start(member) + tensor.offset * itemsize
    strides = None if _is_row_by_row(tensor) else tensor.strides
    return TensorInfo(name, storage.dtype, tensor.shape, start, start + extent * itemsize, strides)


def _is_row_by_row(tensor: StoredTensor) -> bool:
    shape = tensor.shape
    axes = [axis for axis, size in enumerate(shape) if size != 1]
    return 0 in shape or all(tensor.strides[axis] == math.prod(shape[axis + 1 :]) for axis in axes)
