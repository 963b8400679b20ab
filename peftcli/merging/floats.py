"""Floats of 16 and 32 bits in numpy, which has no bfloat16: there it is the upper half of a float32, rounded to even."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftcli.lazy import numpy

if TYPE_CHECKING:
    from numpy.typing import NDArray

STORED = {"BF16": "u2", "F16": "f2", "F32": "f4"}
"""safetensors' names of dtypes, and numpy's of what holds their values."""

OVERFLOWS = {"BF16": 0x7F7F8000, "F16": 0x477FF000, "F32": 0x7F800000}
"""The bits of the smallest float32 that becomes infinity in each: those of all larger ones, and of NaN, are greater."""


def widen(stored: NDArray[Any], dtype: str, wide: NDArray[Any]) -> None:
    """Values of a dtype, as `STORED` holds them, into float32 `wide` of the same shape."""
    if dtype == "BF16":
        bits = wide.view("u4")
        numpy.copyto(bits, stored)
        numpy.left_shift(bits, 16, out=bits)
    else:
        numpy.copyto(wide, stored)


def narrow(wide: NDArray[Any], dtype: str, stored: NDArray[Any], spare: NDArray[Any]) -> None:
    """The inverse, rounded to the nearest; `wide` is used up.

    Args:
        wide: float32, finite (see `is_finite`).
        dtype: what to round to.
        stored: takes the values.
        spare: uint32 of the same shape, for what is in between.
    """
    if dtype == "BF16":
        bits = wide.view("u4")
        numpy.right_shift(bits, 16, out=spare)
        numpy.bitwise_and(spare, 1, out=spare)  # 1 for odd ones: a draw goes to the even neighbour
        numpy.add(spare, 0x7FFF, out=spare)
        numpy.add(bits, spare, out=bits)
        numpy.right_shift(bits, 16, out=bits)
        numpy.copyto(stored, bits, casting="unsafe")
    else:
        numpy.copyto(stored, wide, casting="same_kind")


def is_finite(wide: NDArray[Any], dtype: str, spare: NDArray[Any]) -> bool:
    """Whether float32 values are numbers, and stay so in a dtype. `spare`: uint32 of the same shape."""
    numpy.bitwise_and(wide.view("u4"), 0x7FFFFFFF, out=spare)
    return bool(spare.max(initial=0) < OVERFLOWS[dtype])


def rounded(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Finite values [...] in a dtype, as `STORED` holds them."""
    wide = values.astype("f4")
    stored = numpy.empty(wide.shape, STORED[dtype])
    narrow(wide, dtype, stored, numpy.empty(wide.shape, "u4"))
    return stored
