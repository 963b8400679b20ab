"""The header of a safetensors file, read strictly, with neither torch nor numpy.

Format: 8 bytes little-endian length, a JSON object `name -> {dtype, shape, data_offsets}`, then the tensors' bytes. The
offsets must cover the data section exactly: a gap may hide another file, an overlap makes two tensors one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from peftcli.errors import InputError, InputErrors, printable
from peftcli.files import open_regular, parse_json

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 64  # torch's limit
MAX_NAME = 512  # characters; a module's path has a hundred at most
MAX_PROBLEMS = 100

BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 16),
    **dict.fromkeys(["U32", "I32", "F32"], 32),
    **dict.fromkeys(["U64", "I64", "F64", "C64"], 64),
}
"""Bits an element of each dtype takes."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in its file.

    Attributes:
        name: its key, as untrusted as the file: print it through `errors.printable`.
        dtype: safetensors' name, a key of `BITS`.
        shape: its dimensions; () is a single number.
        start, stop: its bytes, counted from the start of the file.
        strides: steps between elements where they do not lie row by row (only `.bin` files can have that).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    strides: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * BITS[self.dtype] // 8


@dataclass(frozen=True)
class TensorFile:
    """A file of tensors, none of which has been read.

    Attributes:
        path: the file.
        size: its size in bytes.
        tensors: by key, in the order of their bytes.
        metadata: free text of the writer.
    """

    path: Path
    size: int
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file.

    Raises:
        InputErrors: listing what is wrong; also for what is no safetensors file at all (git-lfs pointers, web pages).
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        entries, data_start = _read_json(file, size, path)
    metadata = entries.pop("__metadata__", {})
    problems = (
        []
        if _is_text_map(metadata)
        else [InputError("maps something else than text to text", place=path, field="__metadata__")]
    )
    tensors = []
    for name, entry in entries.items():
        try:
            tensors.append(_tensor(name, entry, data_start))
        except ValueError as error:
            problems.append(InputError(str(error), place=path, field=printable(name)))
            if len(problems) > MAX_PROBLEMS:
                break
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    problems = problems or _cover_problems(tensors, data_start, size, path)
    if problems:
        raise InputErrors(problems)
    return TensorFile(path, size, {tensor.name: tensor for tensor in tensors}, metadata)


def _read_json(file: BinaryIO, size: int, path: Path) -> tuple[dict[str, Any], int]:
    """The header's object and where the data section starts."""
    first = file.read(min(size, 64))
    length = int.from_bytes(first[:8], "little")
    if size < 8 or first[8:9] != b"{" or length > min(MAX_HEADER_BYTES, size - 8):
        raise InputError(_what_else(first, size, length), place=path, fix=_fix(first))
    file.seek(8)
    try:
        entries = parse_json(file.read(length))
    except ValueError as error:
        raise InputError(f"has a broken header: {error}", place=path) from error
    if not isinstance(entries, dict):
        raise InputError("has a header that is no JSON object", place=path)
    return entries, 8 + length


def _what_else(first: bytes, size: int, length: int) -> str:
    """What a file is that is no safetensors file."""
    text = first.lstrip().lower()
    if size == 0:
        return "is empty (0 bytes): not a safetensors file"
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not a safetensors file"
    if first.startswith((b"PK\x03\x04", b"\x80")):
        return "is a pickle (a torch `.bin`), not a safetensors file"
    if first.startswith(b"GGUF"):
        return "is a GGUF file, not a safetensors file"
    if size < 8:
        return f"has {size} bytes: shorter than the length field of a safetensors file"
    if length > MAX_HEADER_BYTES:
        return (
            f"announces a header of {length:,} bytes, above the limit of {MAX_HEADER_BYTES:,}: not a safetensors file"
        )
    if length > size - 8:
        return f"announces a header of {length:,} bytes but has only {size - 8:,} more: cut short, or not a safetensors file"
    return "has a header that does not start with `{`: not a safetensors file"


def _fix(first: bytes) -> str | None:
    return "fetch the file itself: `git lfs pull`" if first.startswith(b"version https://git-lfs") else None


def _tensor(name: str, entry: Any, data_start: int) -> TensorInfo:
    """One entry of the header, checked on its own; ValueError says what is wrong."""
    if len(name) > MAX_NAME:
        raise ValueError(f"has a name of more than {MAX_NAME} characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("is no object of `dtype`, `shape` and `data_offsets`")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"has the unknown dtype {printable(repr(dtype), 60)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"has the shape {printable(repr(shape), 80)}: whole numbers from 0 on are meant")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"has the data_offsets {printable(repr(offsets), 80)}: two rising whole numbers are meant")
    needed, partial = divmod(math.prod(shape) * BITS[dtype], 8)
    if partial or needed != offsets[1] - offsets[0]:
        raise ValueError(f"is {dtype} {shape}: {needed:,} bytes, but its offsets span {offsets[1] - offsets[0]:,}")
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(values: Any) -> bool:
    """Whether `values` is a list of whole numbers that 63 bits hold (True and False are none)."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _is_text_map(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(value, str) for value in values.values())


def _cover_problems(tensors: list[TensorInfo], start: int, size: int, path: Path) -> list[InputError]:
    """Gaps and overlaps between sorted tensors, and bytes after the last one."""
    problems = []
    for tensor in tensors:
        if tensor.start != start:
            what = "overlaps the tensor before it" if tensor.start < start else "leaves a gap before it"
            problems.append(
                InputError(f"{what} ({abs(tensor.start - start):,} bytes)", place=path, field=printable(tensor.name))
            )
        start = tensor.stop
    if start > size:
        problems.append(
            InputError(f"is cut short: the tensors need {start:,} bytes, the file has {size:,}", place=path)
        )
    elif start < size:
        problems.append(InputError(f"has {size - start:,} bytes after the last tensor", place=path))
    return problems[:MAX_PROBLEMS]
