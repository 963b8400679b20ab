"""Two adapters side by side: fields, tensors and values in which they differ."""

from __future__ import annotations

from typing import Any, BinaryIO

from peftcli.adapters.audit import Audit
from peftcli.adapters.header import TensorInfo
from peftcli.adapters.values import FLOATS, read_array
from peftcli.files import open_regular
from peftcli.lazy import numpy


def diff_summary(first: Audit, second: Audit) -> dict[str, Any]:
    """What differs from `first` to `second`.

    Returns:
        config: field -> both values; only_first, only_second: names of tensors; tensors: one row for each that is in
        both and differs, with the relative size of the change |y - x| / |x| and the cosine between the two.
    """
    one, two = first.config.to_dict(), second.config.to_dict()
    ours, theirs = first.file.tensors, second.file.tensors
    rows = _tensor_rows(first, second)
    return {
        "kind": "diff",
        "paths": [str(first.folder), str(second.folder)],
        "config": {name: [one.get(name), two.get(name)] for name in {**one, **two} if one.get(name) != two.get(name)},
        "only_first": [name for name in ours if name not in theirs],
        "only_second": [name for name in theirs if name not in ours],
        "equal": sum(1 for name in ours if name in theirs) - len(rows),
        "tensors": rows,
    }


def _tensor_rows(first: Audit, second: Audit) -> list[dict[str, Any]]:
    with open_regular(first.file.path) as here, open_regular(second.file.path) as there:
        rows = [
            _row((here, ours), (there, second.file.tensors[name]))
            for name, ours in first.file.tensors.items()
            if name in second.file.tensors
        ]
    return [row for row in rows if row is not None]


def _row(one: tuple[BinaryIO, TensorInfo], two: tuple[BinaryIO, TensorInfo]) -> dict[str, Any] | None:
    """How a tensor differs between two files, or None if it does not. Values are compared where both are floats."""
    ours, theirs = one[1], two[1]
    row: dict[str, Any] = {
        "name": ours.name,
        "shapes": [list(ours.shape), list(theirs.shape)],
        "dtypes": [ours.dtype, theirs.dtype],
    }
    alike = (ours.shape, ours.dtype, ours.strides) == (theirs.shape, theirs.dtype, theirs.strides)
    if alike and _content(*one) == _content(*two):
        return None
    if ours.shape != theirs.shape or not {ours.dtype, theirs.dtype} <= FLOATS:
        return row
    x, y = (read_array(*pair).astype("f8").ravel() for pair in (one, two))
    change, product = float(numpy.linalg.norm(y - x)), float(numpy.linalg.norm(x) * numpy.linalg.norm(y))
    size = float(numpy.linalg.norm(x))
    row["change"] = change / size if size else None
    row["cosine"] = float(x @ y) / product if product else None
    return row


def _content(file: BinaryIO, tensor: TensorInfo) -> bytes:
    file.seek(tensor.start)
    return file.read(tensor.stop - tensor.start)
