"""Metrics as estimates with standard errors, so that a difference can be told from chance.

A metric gives a value and each sample's influence on it: the first-order change of the value that is due to that
sample. The standard error follows from the influences alone, also for ratios (loss per token) and functions of them
(perplexity), and the error of base against adapter from the differences of their influences: both saw the same
samples, so the comparison is paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftcli.errors import InputError, nearest, printable
from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Estimate:
    """A metric's value over a data set.

    Args:
        value: the metric.
        influence: [n] float64, by sample; they add up to zero.
    """

    value: float
    influence: NDArray[np.float64]

    @property
    def standard_error(self) -> float:
        """Standard error of the value; NaN for a single sample, which says nothing about spread."""
        count = len(self.influence)
        return math.sqrt(count / (count - 1) * float(np.square(self.influence).sum())) if count > 1 else math.nan

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference of two estimates over the same samples."""
        return Estimate(self.value - other.value, self.influence - other.influence)


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Sum over sum: the mean loss of all tokens from the losses and token counts of samples (Cochran 1977, ch. 6)."""
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    value = above.sum() / below.sum()
    return Estimate(float(value), (above - value * below) / below.sum())


def mean(values: Sequence[float]) -> Estimate:
    return ratio(values, np.ones(len(values)))


def exponential(estimate: Estimate) -> Estimate:
    """`exp` of an estimate by the delta method; capped where it would overflow."""
    value = math.exp(min(estimate.value, 700.0))
    return Estimate(value, value * estimate.influence)


@dataclass(frozen=True)
class TokenScores:
    """What a model made of the learnt tokens, by sample.

    Args:
        losses: [n] float64, summed negative log-likelihoods in nats.
        counts: [n] int64, learnt tokens.
    """

    losses: NDArray[np.float64]
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class Metric:
    """One metric, over tokens (from their likelihoods) or over answers (from generated text).

    Args:
        higher_is_better: the good direction.
        of_tokens: the estimate from the token scores; None for a metric of answers.
        of_answer: 0 to 1 for one answer from (generated, expected); None for a metric of tokens.
    """

    higher_is_better: bool
    of_tokens: Callable[[TokenScores], Estimate] | None = None
    of_answer: Callable[[str, str], float] | None = None

    @property
    def needs_answers(self) -> bool:
        return self.of_answer is not None

    def reaches(self, value: float, threshold: float) -> bool:
        """Whether `value` is at least as good as `threshold`; NaN never is."""
        return value >= threshold if self.higher_is_better else value <= threshold


def loss(scores: TokenScores) -> Estimate:
    """Mean negative log-likelihood of a learnt token, in nats."""
    return ratio(scores.losses, scores.counts)


def perplexity(scores: TokenScores) -> Estimate:
    """exp(loss)."""
    return exponential(loss(scores))


def exact_match(generated: str, expected: str) -> float:
    """Whether the answer is the expected one, blanks around it aside."""
    return float(generated.strip() == expected.strip())


def contains(generated: str, expected: str) -> float:
    """Whether the expected answer stands somewhere in the generated one."""
    return float(expected.strip() in generated)


METRICS = {
    "loss": Metric(higher_is_better=False, of_tokens=loss),
    "perplexity": Metric(higher_is_better=False, of_tokens=perplexity),
    "exact_match": Metric(higher_is_better=True, of_answer=exact_match),
    "contains": Metric(higher_is_better=True, of_answer=contains),
}


def find(name: str, field: str) -> Metric:
    """The metric of that name.

    Raises:
        InputError: there is none; names `field` and those there are.
    """
    if name not in METRICS:
        raise InputError(
            f"{printable(repr(name))} is not a metric",
            field=field,
            allowed=", ".join(METRICS),
            fix=str(nearest(name, METRICS)) or None,
        )
    return METRICS[name]


def plain(value: float) -> Any:
    """A number as JSON can hold it: None where it is not finite."""
    return value if math.isfinite(value) else None
