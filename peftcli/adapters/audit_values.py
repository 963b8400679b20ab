"""The values in an adapter file: dtypes, empty tensors, NaN, and what looks as if it was never trained or half saved."""

from __future__ import annotations

from collections import defaultdict

from peftcli.adapters.audit_modules import Contents
from peftcli.adapters.base import TensorSpec
from peftcli.adapters.findings import Findings
from peftcli.adapters.header import TensorFile, TensorInfo
from peftcli.adapters.values import FLOATS, Values, look
from peftcli.files import open_regular

MAX_BYTES, MAX_BYTES_OF_BROKEN = 64 << 30, 1 << 30
"""No adapter is larger; a file with a hole in it may seem so, and would take minutes to read."""

DTYPE_NAMES = {"int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "uint8": "U8", "bool": "BOOL"}
"""torch's dtype names in a `TensorSpec`, as safetensors writes them."""


def check_values(file: TensorFile, contents: Contents, findings: Findings) -> dict[str, Values]:
    """Read every float tensor once.

    Returns:
        What its values look like, by key.
    """
    specs = _specs(contents)
    copies = {tensor.name for _, tensor in contents.others}
    values: dict[str, Values] = {}
    if file.size > (MAX_BYTES_OF_BROKEN if findings.errors else MAX_BYTES):
        findings.error(f"has {file.size:,} bytes: its values were not read")
        return values
    with open_regular(file.path) as opened:
        for name, tensor in file.tensors.items():
            if tensor.numel == 0:
                findings.error(f"is empty (shape {list(tensor.shape)}): a sharded save that gathered nothing?", name)
            elif _has_right_dtype(tensor, specs.get(name), name in copies, findings) and tensor.dtype in FLOATS:
                values[name] = look(opened, tensor)
                _check(tensor, values[name], specs.get(name), findings)
    _check_training(contents, specs, values, findings)
    return values


def _specs(contents: Contents) -> dict[str, TensorSpec]:
    """What the methods say about each of their tensors, by key."""
    specs = {
        tensor.name: part.fits[path].specs[parameter]
        for part in contents.parts
        for path, found in part.modules.items()
        for parameter, tensor in found.items()
        if path in part.fits and parameter in part.fits[path].specs
    }
    for part in contents.parts:
        for fit in part.fits.values() if part.shared else ():
            stated = fit.adapter.tensors()
            specs |= {tensor.name: stated[name] for name, tensor in part.shared.items() if name in stated}
    return specs


def _has_right_dtype(tensor: TensorInfo, spec: TensorSpec | None, is_copy: bool, findings: Findings) -> bool:
    if spec is not None and spec.dtype is not None:
        wanted = DTYPE_NAMES.get(spec.dtype, spec.dtype)
        if tensor.dtype != wanted:
            findings.error(f"is stored as {tensor.dtype}, not {wanted}", tensor.name)
        return tensor.dtype == wanted
    if tensor.dtype in FLOATS:
        if tensor.dtype.startswith("F8"):
            findings.doubt(f"is stored as {tensor.dtype}, with three digits at most: cast up when loaded", tensor.name)
        return True
    if is_copy:  # a module's counters may be whole numbers
        return True
    findings.error(f"is stored as {tensor.dtype}; floats are meant (F32, BF16, F16, F64)", tensor.name)
    return False


def _check(tensor: TensorInfo, values: Values, spec: TensorSpec | None, findings: Findings) -> None:
    rows = tensor.shape[0] if tensor.shape else 0
    if values.nonfinite:
        findings.error(f"holds {values.nonfinite:,} values that are NaN or infinite", tensor.name)
    elif values.zero:
        if spec is None or spec.init != "zeros":
            findings.doubt("is all zero", tensor.name)
    elif values.constant:
        if spec is None or spec.trainable:  # state may stay as it was made (MonteCLoRA's weights)
            findings.doubt("holds one and the same value everywhere", tensor.name)
    elif spec is not None and spec.init == "zeros" and values.zero_rows * 2 >= rows > 1:
        findings.doubt(f"has {values.zero_rows:,} rows of {rows:,} that are all zero: a partial shard?", tensor.name)


def _check_training(
    contents: Contents, specs: dict[str, TensorSpec], values: dict[str, Values], findings: Findings
) -> None:
    """A tensor that starts as zero and still is one has not been trained."""
    still_zero: dict[str, list[str]] = defaultdict(list)
    seen: dict[str, int] = defaultdict(int)
    for part in contents.parts:
        for path, found in part.modules.items():
            for parameter, tensor in found.items():
                spec = specs.get(tensor.name)
                if spec is not None and spec.init == "zeros" and spec.trainable and tensor.name in values:
                    seen[parameter] += 1
                    if values[tensor.name].zero:
                        still_zero[parameter].append(f"{path}.{parameter}")
    for parameter, names in still_zero.items():
        name = parameter.removesuffix(".weight")
        everywhere = len(names) == seen[parameter]
        text = f"{name} all zero: untrained" if everywhere else f"{name} all zero, others are not: not trained"
        for tensor_name in names:
            findings.doubt(text, tensor_name)
