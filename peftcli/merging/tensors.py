"""Single tensors out of safetensors files (and `.bin` files, whose bytes are found without unpickling), and into them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.adapters.header import TensorInfo
from peftcli.errors import InputError, printable
from peftcli.files import open_regular
from peftcli.lazy import numpy, torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}
"""safetensors' names of dtypes, and torch's."""

_NAMES = {name: code for code, name in DTYPES.items()}


def read_tensor(path: Path, info: TensorInfo) -> Tensor:
    """One tensor of a file whose header has been checked."""
    if info.dtype not in DTYPES:
        raise InputError(f"holds {info.dtype}, which torch can't compute with", place=path, field=printable(info.name))
    dtype = getattr(torch, DTYPES[info.dtype])
    if info.start == info.stop:
        return torch.empty(info.shape, dtype=dtype)
    raw: Any = numpy.empty(info.stop - info.start, "u1")
    with open_regular(path) as file:
        file.seek(info.start)
        if file.readinto(raw) != len(raw):  # type: ignore[attr-defined]  # a buffered reader has it
            raise InputError("ended while it was read", place=path, field=printable(info.name))
    flat = torch.from_numpy(raw).view(dtype)
    return flat.reshape(info.shape) if info.strides is None else flat.as_strided(info.shape, info.strides).contiguous()


def dtype_code(dtype: object) -> str:
    """safetensors' name of torch's or numpy's dtype."""
    return _NAMES[str(dtype).removeprefix("torch.")]


def tensor_bytes(tensor: Tensor | NDArray[Any]) -> memoryview:
    """A tensor's bytes, row by row, as the format wants them."""
    array: Any = (
        tensor if isinstance(tensor, numpy.ndarray) else tensor.detach().contiguous().view(-1).view(torch.uint8)
    )
    raw: Any = numpy.ascontiguousarray(array)
    return memoryview(raw).cast("B")


def header_bytes(entries: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file: its length and the JSON, padded to a multiple of 8.

    Args:
        entries: dtype, shape and size in bytes of each tensor, in the order of the data.
        metadata: free text.
    """
    described: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape, size) in entries.items():
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class TensorWriter:
    """Writes a safetensors file tensor by tensor, so that none has to be kept until the last is known.

    The format begins with a list of all tensors, so data goes to a file beside it and is appended when the `with` ends well.

    Args:
        path: the file; it appears at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._data = path, path.with_name(path.name + ".data")
        self._file = self._data.open("wb")
        self._entries: dict[str, tuple[str, tuple[int, ...], int]] = {}

    def add(self, name: str, tensor: Tensor | NDArray[Any]) -> None:
        raw = tensor_bytes(tensor)
        self._entries[name] = (dtype_code(tensor.dtype), tuple(tensor.shape), len(raw))
        self._file.write(raw)

    def copy(self, info: TensorInfo, path: Path) -> None:
        """Add a tensor of another file as it is."""
        if info.strides is not None:
            self.add(info.name, read_tensor(path, info))
            return
        self._entries[info.name] = (info.dtype, info.shape, info.stop - info.start)
        self._file.flush()
        with open_regular(path) as source:
            copy_range(source.fileno(), info.start, self._file.fileno(), info.stop - info.start)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, failure: type[BaseException] | None, *details: object) -> None:
        self._file.close()
        if failure is None:
            self._join()
        self._data.unlink()

    def _join(self) -> None:
        """Put header and data together, and on the disk."""
        with self.path.open("wb") as whole, self._data.open("rb") as data:
            whole.write(header_bytes(self._entries, {"format": "pt"}))
            whole.flush()
            copy_range(data.fileno(), 0, whole.fileno(), self._data.stat().st_size)
            os.fsync(whole.fileno())


def copy_range(source: int, offset: int, target: int, count: int) -> None:
    """Append bytes of one open file to another, inside the kernel where the system can do that.

    Args:
        source, target: file descriptors; the target's position moves on.
        offset: where to start in the source.
        count: how many bytes.
    """
    while count > 0:
        moved = 0
        if hasattr(os, "copy_file_range"):
            try:
                moved = os.copy_file_range(source, target, min(count, 1 << 30), offset)
            except OSError:  # two file systems that can't do it between them
                moved = 0
        if not moved:
            block = os.pread(source, min(count, 8 << 20), offset)
            if not block:
                raise OSError("the file ended while it was copied")
            moved = os.write(target, block)
        offset, count = offset + moved, count - moved
