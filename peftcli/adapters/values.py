"""Looking at every value of a tensor in a file: not-a-number, zero, constant, empty rows. Bounded memory, no numpy.

A float is not finite if its exponent bits are all ones, which shows in its one or two highest bytes. So bytes are
compared, at C speed, and `peft inspect` does without numpy's import (a third of its time). What computes with values
(`--norms`, `--svd`) asks `read_array`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from peftcli.adapters.header import BITS, TensorInfo
from peftcli.lazy import numpy

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK_BYTES = 4 << 20

EXPONENTS = {
    "F64": (0x7F, 0xF0),
    "F32": (0x7F, 0x80),
    "BF16": (0x7F, 0x80),
    "F16": (0x7C,),
    "F8_E5M2": (0x7C,),
    "F8_E4M3": (0x7F,),  # has no infinity; only all ones is not a number
}
"""Bits of the highest bytes (most significant first) that are all set in a value that is not finite."""

FLOATS = frozenset(EXPONENTS)


@dataclass(frozen=True)
class Values:
    """What a tensor's values look like.

    Attributes:
        nonfinite: how many are NaN or infinite.
        zero: all are zero.
        constant: all are the same (and there are at least two).
        zero_rows: how many of the `shape[0]` rows are all zero; 0 for vectors.
    """

    nonfinite: int
    zero: bool
    constant: bool
    zero_rows: int


def look(file: BinaryIO, tensor: TensorInfo) -> Values:
    """Read a tensor once, front to back.

    Args:
        file: the open file the tensor lies in.
        tensor: a floating tensor with at least one element.
    """
    itemsize = BITS[tensor.dtype] // 8
    row_bytes = tensor.nbytes // tensor.shape[0] if len(tensor.shape) > 1 and tensor.strides is None else 0
    step = row_bytes if 0 < row_bytes <= CHUNK_BYTES else itemsize
    first: bytes | None = None
    nonfinite = zero_rows = 0
    zero = constant = True
    for chunk in _chunks(file, tensor, step):
        first = first or chunk[:itemsize]
        nonfinite += _count_nonfinite(chunk, itemsize, EXPONENTS[tensor.dtype])
        zero = zero and chunk == bytes(len(chunk))
        constant = constant and chunk == first * (len(chunk) // itemsize)
        if step == row_bytes:
            zero_rows += _count_zero_rows(chunk, row_bytes)
    return Values(nonfinite, zero, constant and tensor.numel > 1, zero_rows)


def _chunks(file: BinaryIO, tensor: TensorInfo, step: int) -> Iterator[bytes]:
    """The tensor's bytes in pieces of whole steps."""
    file.seek(tensor.start)
    left = tensor.stop - tensor.start
    size = CHUNK_BYTES // step * step
    while left > 0:
        chunk = file.read(min(size, left))
        if not chunk:
            raise OSError(f"the file ended within {tensor.name}")
        left -= len(chunk)
        yield chunk


def _count_nonfinite(chunk: bytes, itemsize: int, masks: tuple[int, ...]) -> int:
    """How many little-endian floats have all bits of `masks` set in their highest bytes."""
    high = [chunk[itemsize - 1 - place :: itemsize] for place in range(len(masks))]
    if not any(byte in high[0] for byte in range(256) if byte & masks[0] == masks[0]):
        return 0
    marks = [int.from_bytes(part.translate(_marking(mask)), "little") for part, mask in zip(high, masks, strict=True)]
    both = marks[0] if len(marks) == 1 else marks[0] & marks[1]
    return both.to_bytes(len(high[0]), "little").count(1)


def _marking(mask: int) -> bytes:
    """A table that turns bytes with all bits of `mask` into 1, others into 0."""
    return bytes(byte & mask == mask for byte in range(256))


def _count_zero_rows(chunk: bytes, row_bytes: int) -> int:
    empty = bytes(row_bytes)
    if empty not in chunk:
        return 0
    return sum(chunk.startswith(empty, start) for start in range(0, len(chunk), row_bytes))


def read_array(file: BinaryIO, tensor: TensorInfo) -> NDArray[numpy.float32]:
    """A floating tensor as float32 (float64 stays)."""
    file.seek(tensor.start)
    raw = file.read(tensor.stop - tensor.start)
    flat = _as_float(raw, tensor.dtype)
    if tensor.strides is None:
        return flat.reshape(tensor.shape)
    steps = tuple(stride * flat.itemsize for stride in tensor.strides)
    return numpy.lib.stride_tricks.as_strided(flat, tensor.shape, steps).copy()


def _as_float(raw: bytes, dtype: str) -> NDArray[numpy.float32]:
    if dtype == "F64":
        return numpy.frombuffer(raw, "<f8")
    if dtype in ("F32", "F16"):
        return numpy.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[dtype]).astype("<f4", copy=False)
    if dtype == "BF16":  # the upper half of a float32
        return (numpy.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    codes = numpy.frombuffer(raw, "u1")
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (codes.astype("<u2") << 8).view("<f2").astype("<f4")
    return _e4m3_table()[codes]


def _e4m3_table() -> NDArray[numpy.float32]:
    """The 256 values of float8 E4M3 (bias 7, no infinity)."""
    codes = numpy.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = numpy.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude[codes & 127 == 127] = numpy.nan
    return (magnitude * numpy.where(codes & 128, -1, 1)).astype("<f4")
