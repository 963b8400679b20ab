"""Whether a difference between base and adapter may be chance: tests for pairs, each sample its own control."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftcli.evaluation.estimates import Estimate
from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIGN, T = "exact sign test", "paired t test"


@dataclass(frozen=True)
class PairedTest:
    """What a test says.

    Args:
        name: which test.
        p: two-sided: how often a difference at least this large comes by chance; NaN for a single sample.
        gained, lost: samples that only the adapter, and only the base, has right; None where samples are not right or
            wrong.
    """

    name: str
    p: float
    gained: int | None = None
    lost: int | None = None


def paired_test(tuned: Estimate, base: Estimate) -> PairedTest:
    """The test that fits: exact for samples that are right or wrong, Student's t by influences for everything else."""
    if _is_binary(tuned.scores) and _is_binary(base.scores):
        difference = tuned.scores - base.scores  # type: ignore[operator]
        gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
        return PairedTest(SIGN, sign_test(gained, lost), gained, lost)
    delta = tuned - base
    return PairedTest(T, t_test(delta.value, delta.standard_error, len(delta.influence)))


def sign_test(gained: int, lost: int) -> float:
    """Exact two-sided sign test of pairs that differ (McNemar's exact test): twice the smaller tail of a fair coin's."""
    count = gained + lost
    tail = sum(math.comb(count, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**count)


def t_test(difference: float, standard_error: float, count: int) -> float:
    """Two-sided p of a mean difference over `count` pairs. Of a mean it is the textbook's paired t test."""
    if count < 2:
        return math.nan
    if standard_error == 0:
        return 0.0 if difference else 1.0
    squared, freedom = (difference / standard_error) ** 2, count - 1
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + squared))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22, Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, the mirror image converges fast
        return 1.0 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny, c, d, fraction = 1e-300, 1.0, 0.0, 1.0
    for step in range(1000):
        m = step // 2
        if step == 0:
            numerator = 1.0
        elif step % 2 == 0:
            numerator = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            numerator = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1.0 / (1.0 + numerator * d or tiny)
        c = 1.0 + numerator / c or tiny
        fraction *= c * d
        if step and abs(1.0 - c * d) < 1e-15:
            break
    return front * (fraction - 1.0) / a


def _is_binary(scores: NDArray[np.float64] | None) -> bool:
    return scores is not None and bool(np.isin(scores, (0.0, 1.0)).all())
