"""Merge operators against vectors worked out by hand and slow references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftcli.merging.operators import OPERATORS, Settings, keep_largest, keep_random, majority_sign

T = [torch.tensor([1.0, -3.0, 0.5, 2.0]), torch.tensor([-2.0, 1.0, 0.4, -0.1])]
W = (1.0, 2.0)
HALF = (0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "method", "expected"),
    [
        ("linear", "total", [-3.0, -1.0, 1.3, 1.8]),
        # kept by magnitude: [0, -3, 0, 2] and [-2, 1, 0, 0]
        ("magnitude_prune", "total", [-4.0, -1.0, 0.0, 2.0]),
        ("ties", "total", [-4.0, -3.0, 0.0, 2.0]),
        ("ties", "frequency", [-4.0, 2.0, 0.0, 2.0]),
    ],
)
def test_by_hand(name: str, method: str, expected: list[float]) -> None:
    result = OPERATORS[name](T, W, Settings(HALF, method))  # type: ignore[arg-type]
    torch.testing.assert_close(result, torch.tensor(expected))


def slow_ties(tensors: list[list[float]], weights: list[float], density: float) -> list[float]:
    kept = []
    for values in tensors:
        order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[: int(density * len(values))]
        kept.append([v if i in order else 0.0 for i, v in enumerate(values)])
    merged = []
    for place in zip(*kept, strict=True):
        sign = 1 if sum(place) >= 0 else -1
        agree = [(v, w) for v, w in zip(place, weights, strict=True) if v * sign > 0]
        merged.append(sum(v * w for v, w in agree) / max(len(agree), 1))
    return merged


@given(
    st.lists(st.lists(st.integers(-5, 5).map(float), min_size=6, max_size=6), min_size=1, max_size=4), st.floats(0, 1)
)
def test_ties_is_the_slow_reference(values: list[list[float]], density: float) -> None:
    weights = [0.5 + i for i in range(len(values))]
    tensors = [torch.tensor(row, dtype=torch.float64) for row in values]
    result = OPERATORS["ties"](tensors, weights, Settings([density] * len(values)))
    torch.testing.assert_close(result, torch.tensor(slow_ties(values, weights, density), dtype=torch.float64))


@given(st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=30), st.floats(0, 1))
def test_exactly_the_asked_number_is_kept(values: list[float], density: float) -> None:
    tensor = torch.tensor(values)
    kept = keep_largest(tensor, density)
    count = int(density * len(values))
    dropped = sorted(tensor[kept == 0].abs().tolist())
    assert int((kept != 0).sum()) == min(count, int((tensor != 0).sum()))
    assert not dropped or not (kept != 0).any() or dropped[-1] <= kept[kept != 0].abs().min()


def test_random_pruning_keeps_the_expectation() -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.ones(200_000)
    pruned = keep_random(tensor, 0.2, generator)
    assert set(pruned.unique().tolist()) == {0.0, 5.0}
    assert pruned.mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_is_reproducible_and_whole_at_density_one(name: str) -> None:
    def run(density: float) -> torch.Tensor:
        return OPERATORS[name](T, W, Settings([density] * 2, generator=torch.Generator().manual_seed(3)))

    assert torch.equal(run(0.5), run(0.5))
    whole = OPERATORS["linear" if name == "dare_linear" else "ties"](T, W, Settings((1.0, 1.0)))
    torch.testing.assert_close(run(1.0), whole)


def test_bad_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="density"):
        keep_largest(T[0], 1.5)
    with pytest.raises(ValueError, match="Unimplemented mask method"):
        majority_sign(T, "loudest")  # type: ignore[arg-type]
