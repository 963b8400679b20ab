"""What is said about a tensor's values agrees with torch, for every float type and every odd value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from peftcli.adapters import values
from peftcli.adapters.header import read_header
from peftcli.adapters.values import FLOATS, look, read_array

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def looked_at(tensor: Tensor, folder: Path) -> tuple[values.Values, np.ndarray]:
    save_file({"t": tensor}, folder / "t.safetensors")
    info = read_header(folder / "t.safetensors").tensors["t"]
    with (folder / "t.safetensors").open("rb") as file:
        return look(file, info), read_array(file, info)


def test_every_float_is_known() -> None:
    assert set(DTYPES) == FLOATS


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_counts(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "CHUNK_BYTES", 64)  # rows and values that cross chunks
    tensor = torch.arange(1, 61).reshape(10, 6).float()
    tensor[3, 4], tensor[9, 5] = float("nan"), float("nan")
    tensor[5:8] = 0
    seen, array = looked_at(tensor.to(dtype), tmp_path)
    assert (seen.nonfinite, seen.zero, seen.constant, seen.zero_rows) == (2, False, False, 3)
    np.testing.assert_array_equal(array, tensor.to(dtype).double().numpy())


@pytest.mark.parametrize("dtype", [dtype for name, dtype in DTYPES.items() if name != "F8_E4M3"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinities(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    assert looked_at(torch.tensor([1.0, value, 2.0]).to(dtype), tmp_path)[0].nonfinite == 1


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_largest_finite_values(dtype: torch.dtype, tmp_path: Path) -> None:
    extremes = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=torch.float64).to(dtype)
    assert looked_at(extremes, tmp_path)[0].nonfinite == 0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_constant_and_zero(dtype: torch.dtype, tmp_path: Path) -> None:
    assert looked_at(torch.full((4, 3), 2.5).to(dtype), tmp_path)[0] == values.Values(0, False, True, 0)
    assert looked_at(torch.zeros(4, 3).to(dtype), tmp_path)[0] == values.Values(0, True, True, 4)
    assert looked_at(torch.tensor(0.0).to(dtype), tmp_path)[0] == values.Values(0, True, False, 0)


def test_all_codes_of_eight_and_sixteen_bits(tmp_path: Path) -> None:
    for name, codes in {"F8_E4M3": "uint8", "F8_E5M2": "uint8", "F16": "int16", "BF16": "int16"}.items():
        bits = torch.from_numpy(np.arange(1 << 8 * np.dtype(codes).itemsize).astype(codes))
        tensor = bits.view(DTYPES[name])
        seen, array = looked_at(tensor, tmp_path)
        assert seen.nonfinite == int((~torch.isfinite(tensor.float())).sum())
        np.testing.assert_array_equal(array, tensor.float().numpy())


@settings(max_examples=200, deadline=None)
@given(numbers=st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_any_floats(numbers: list[float], tmp_path_factory: pytest.TempPathFactory) -> None:
    tensor = torch.tensor(numbers, dtype=torch.float32)
    seen, array = looked_at(tensor, tmp_path_factory.getbasetemp())
    assert seen.nonfinite == int((~torch.isfinite(tensor)).sum())
    np.testing.assert_array_equal(array, tensor.numpy())


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"t": torch.ones(100)}, path)
    info = read_header(path).tensors["t"]
    path.write_bytes(path.read_bytes()[:-8])
    with path.open("rb") as file, pytest.raises(OSError, match="ended within t"):
        look(file, info)
