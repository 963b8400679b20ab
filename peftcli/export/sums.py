"""A stored tensor plus products of small matrices, from file to file, a block of rows at a time.

Blocks are so small that all of a block's work happens in the processor's cache: in memory it would be slower than copying
the file. It is numpy's, so that merging LoRA into a base does not wait for torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.adapters.header import TensorInfo
from peftcli.adapters.values import read_array
from peftcli.errors import InputError, printable
from peftcli.files import open_regular
from peftcli.lazy import numpy
from peftcli.merging.floats import STORED, is_finite, narrow, widen

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 1 << 16
"""Elements in float32 at once."""


@dataclass(frozen=True)
class Product:
    """B A for each of the matrices a stored tensor consists of, as it is stored.

    Attributes:
        a: [matrices, r, columns], float32.
        b: [matrices, rows, r], float32.
    """

    a: NDArray[Any]
    b: NDArray[Any]

    @classmethod
    def of(cls, a: NDArray[Any], b: NDArray[Any], *, transposed: bool = False) -> Product:
        """Of A [..., r, in] and B [..., out, r], for a tensor that holds [..., in, out] if `transposed`."""
        if transposed:
            a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
        stacked = (numpy.ascontiguousarray(factor, "f4").reshape(-1, *factor.shape[-2:]) for factor in (a, b))
        return cls(*stacked)


def write_sum(source: Path, info: TensorInfo, target: int, products: Sequence[Product], dtype: str) -> None:
    """Append a tensor of one file, with products added to it, to another.

    Args:
        source: the file it lies in.
        info: the tensor; its dtype is one of `STORED`.
        target: the other's file descriptor.
        products: what to add; of one shape, the tensor's. None only converts.
        dtype: what to write, of `STORED`.

    Raises:
        InputError: if a value would not be finite.
    """
    matrices, rows = products[0].b.shape[:2] if products else (1, info.numel)
    columns = info.numel // (matrices * rows)
    step = min(rows, max(1, BLOCK // columns))
    wide = numpy.empty((step, columns), "f4")
    more, spare = numpy.empty_like(wide), numpy.empty_like(wide, "u4")
    narrowed = numpy.empty_like(wide, STORED[dtype])
    blocks = _blocks(source, info, (matrices, rows, columns), wide)
    for matrix, start, block in blocks:
        count = len(block)
        with numpy.errstate(over="ignore", invalid="ignore"):  # told below
            for product in products:
                numpy.matmul(product.b[matrix, start : start + count], product.a[matrix], out=more[:count])
                numpy.add(block, more[:count], out=block)
        if not is_finite(block, dtype, spare[:count]):
            raise InputError(f"{printable(info.name)} would hold NaN or infinity", fix=wider(dtype))
        narrow(block, dtype, narrowed[:count], spare[:count])
        write_all(target, memoryview(narrowed[:count]).cast("B"))  # type: ignore[arg-type]  # an array is a buffer


def write_all(target: int, data: memoryview) -> None:
    """Write all of it: one call may stop short."""
    while data:
        data = data[os.write(target, data) :]


def wider(dtype: str) -> str | None:
    """What to do about values that are too large for a dtype."""
    return "--dtype float32" if dtype == "F16" else None


def _blocks(
    source: Path, info: TensorInfo, shape: tuple[int, int, int], wide: NDArray[Any]
) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """Matrix, first row and values of each block of rows, in float32 in the buffer `wide`."""
    matrices, rows, _ = shape
    with open_regular(source) as file:
        whole = None if info.strides is None else read_array(file, info).reshape(shape)
        stored: Any = numpy.empty(wide.shape, STORED[info.dtype])
        file.seek(info.start)
        for matrix in range(matrices):
            for start in range(0, rows, len(wide)):
                block = wide[: min(len(wide), rows - start)]
                if whole is not None:
                    numpy.copyto(block, whole[matrix, start : start + len(block)])
                else:
                    piece = stored[: len(block)]
                    if file.readinto(memoryview(piece).cast("B")) != piece.nbytes:  # type: ignore[attr-defined]
                        raise InputError("ended while it was read", place=source, field=printable(info.name))
                    widen(piece, info.dtype, block)
                yield matrix, start, block
