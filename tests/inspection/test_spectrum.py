"""Norms, singular values and differences are those of the matrices they speak of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from adapter_files import PATH, Tensor, floats, lora_tensors, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcli.adapters.audit import audit_folder
from peftcli.inspection.diff import diff_summary
from peftcli.inspection.spectrum import describe, norm_rows, singular_values, spectrum_rows

A = PATH.format(layer=0, module="q_proj", name="lora_A.weight")
B = PATH.format(layer=0, module="q_proj", name="lora_B.weight")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def tensor(array: np.ndarray) -> Tensor:
    return "F32", array.shape, array.astype("<f4").tobytes()


@settings(max_examples=50, deadline=None)
@given(r=st.integers(1, 6), inputs=st.integers(1, 12), outputs=st.integers(1, 12), seed=st.integers(0, 1000))
def test_singular_values_without_the_product(r: int, inputs: int, outputs: int, seed: int) -> None:
    a, b = random(r, inputs, seed=seed).astype("f8"), random(outputs, r, seed=seed + 1).astype("f8")
    whole = np.linalg.svd(b @ a, compute_uv=False)
    ours = singular_values(a, b)
    count = min(len(whole), len(ours))
    np.testing.assert_allclose(ours[:count], whole[:count], atol=1e-12)
    np.testing.assert_allclose(np.concatenate([ours[count:], whole[count:]]), 0, atol=1e-12)


def test_effective_rank() -> None:
    assert describe(np.ones(4)) == pytest.approx({"norm": 2, "largest": 1, "effective_rank": 4, "rank_99": 4})
    assert describe(np.array([1.0, 0, 0]))["effective_rank"] == pytest.approx(1)
    assert describe(np.array([10.0, 0.1]))["rank_99"] == 1
    assert describe(np.zeros(3)) == {"norm": 0, "largest": 0, "effective_rank": 0, "rank_99": 0}


def test_rows_of_an_adapter(tmp_path: Path) -> None:
    a, b = random(4, 16), random(16, 4, seed=1)
    audit = audit_folder(write_adapter(tmp_path, lora_tensors() | {A: tensor(a), B: tensor(b)}))
    row = next(row for row in spectrum_rows(audit) if row["module"] == "model.layers.0.self_attn.q_proj")
    assert row["norm"] == pytest.approx(2.0 * np.linalg.norm(b @ a), rel=1e-5)  # alpha 8 / r 4
    norms = next(row for row in norm_rows(audit) if row["module"] == "model.layers.0.self_attn.q_proj")
    assert norms["update"] == row["norm"]
    assert norms["tensors"]["lora_A.weight"] == pytest.approx(np.linalg.norm(a), rel=1e-5)


def test_an_update_that_needs_the_base_has_no_spectrum(tmp_path: Path) -> None:
    magnitudes = {
        name.replace("lora_A.weight", "lora_magnitude_vector"): floats(16 if "q_proj" in name else 8)
        for name in lora_tensors()
        if "lora_A" in name
    }
    audit = audit_folder(write_adapter(tmp_path, lora_tensors() | magnitudes, use_dora=True))
    assert audit.errors == []
    assert spectrum_rows(audit) == []
    assert all(row["update"] is None for row in norm_rows(audit))


def test_diff(tmp_path: Path) -> None:
    one = audit_folder(write_adapter(tmp_path / "one"))
    a = np.frombuffer(lora_tensors()[A][2], "<f4").reshape(4, 16)
    tensors = lora_tensors() | {A: tensor(2 * a), "base_model.model.lm_head.weight": floats(3, 16)}
    two = audit_folder(write_adapter(tmp_path / "two", tensors, lora_alpha=16, modules_to_save=["lm_head"]))
    diff = diff_summary(one, two)
    assert diff["config"]["lora_alpha"] == [8, 16]
    assert (diff["only_first"], diff["only_second"]) == ([], ["base_model.model.lm_head.weight"])
    (row,) = diff["tensors"]
    assert (row["name"], diff["equal"]) == (A, 7)
    assert (row["change"], row["cosine"]) == (pytest.approx(1), pytest.approx(1))
    same = diff_summary(one, one)
    assert (same["config"], same["tensors"], same["equal"]) == ({}, [], 8)
