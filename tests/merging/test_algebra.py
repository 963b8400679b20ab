"""What follows from Gram matrices against decompositions of the whole update."""

from __future__ import annotations

import numpy as np
import pytest

from peftcli.merging.algebra import LowRank, Rank, compress, inner_products, sign_conflicts, stack

RANDOM = np.random.default_rng(0)


def product(rank: int, out: int = 40, inputs: int = 30) -> LowRank:
    return LowRank(RANDOM.standard_normal((rank, inputs), "f4"), RANDOM.standard_normal((out, rank), "f4"))


def dependent() -> LowRank:
    """Rank 3 of 6: the second half repeats the first, by which Gram matrices are singular."""
    one = product(3)
    return stack([one, LowRank(one.a, 2 * one.b)])


@pytest.mark.parametrize("update", [product(6), dependent(), LowRank(product(4).a, np.zeros((40, 4), "f4"))])
@pytest.mark.parametrize("rank", [Rank(), Rank(number=2), Rank(energy=0.8)])
def test_the_best_product_of_a_rank(update: LowRank, rank: Rank) -> None:
    whole = update.b.astype("f8") @ update.a.astype("f8")
    u, s, vh = np.linalg.svd(whole)
    made = compress(update, rank, RANDOM)
    count = made.factors.rank
    np.testing.assert_allclose(made.factors.dense(), u[:, :count] * s[:count] @ vh[:count], atol=1e-5)
    assert made.norm == pytest.approx(np.linalg.norm(whole), abs=1e-5)
    if made.norm:
        assert made.energy == pytest.approx((s[:count] ** 2).sum() / (s**2).sum(), abs=1e-6)
        assert rank.energy is None or made.energy >= rank.energy > (s[: count - 1] ** 2).sum() / (s**2).sum()


def test_rounding_is_dropped() -> None:
    assert compress(dependent(), Rank(), RANDOM).factors.rank == 3
    kept = compress(product(6), Rank(), RANDOM).factors
    assert kept.rank == 6


def test_inner_products_need_no_update() -> None:
    updates = [product(2), product(5), product(1)]
    wanted = [[float((one.dense() * other.dense()).sum(dtype="f8")) for other in updates] for one in updates]
    np.testing.assert_allclose(inner_products(updates, stack(updates)), wanted, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(inner_products(updates, None), wanted, rtol=1e-5, atol=1e-4)


def test_sign_conflicts_of_a_sample() -> None:
    first, second = product(3, 500, 700), product(3, 500, 700)
    exact = np.mean(np.sign(first.dense()) != np.sign(second.dense()))
    assert sign_conflicts([first, second], [1, 1]) == pytest.approx(exact, abs=0.03)
    assert sign_conflicts([first, second], [1, -1]) == pytest.approx(1 - exact, abs=0.03)
