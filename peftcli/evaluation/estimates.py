"""Values over a data set with standard errors, so that a difference can be told from chance.

An estimate is a value and each sample's influence on it: the first-order change of the value that is due to that
sample. The standard error follows from the influences alone, also for ratios (loss per token), functions of them
(perplexity) and means of them (macro F1), and the error of base against adapter from the differences of their
influences: both saw the same samples, so the comparison is paired.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Estimate:
    """A metric's value over a data set.

    Args:
        value: the metric.
        influence: [n] float64, by sample; they add up to zero.
        scores: [n] float64, each sample's own value, where the metric is their mean; else None.
    """

    value: float
    influence: NDArray[np.float64]
    scores: NDArray[np.float64] | None = None

    @property
    def standard_error(self) -> float:
        """Standard error of the value; NaN for a single sample, which says nothing about spread."""
        count = len(self.influence)
        return math.sqrt(count / (count - 1) * float(np.square(self.influence).sum())) if count > 1 else math.nan

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference of two estimates over the same samples."""
        return Estimate(self.value - other.value, self.influence - other.influence)


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Sum over sum: the mean loss of all tokens from the losses and token counts of samples (Cochran 1977, ch. 6).

    0 over 0 is 0, as F1 has it where there is nothing to find and nothing was found.
    """
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    total = below.sum()
    if total == 0:
        return Estimate(0.0, np.zeros(len(below)))
    value = above.sum() / total
    return Estimate(float(value), (above - value * below) / total)


def mean(values: Sequence[float]) -> Estimate:
    """The mean of the samples' own values."""
    scores = np.asarray(values, np.float64)
    return Estimate(float(scores.mean()), (scores - scores.mean()) / len(scores), scores)


def exponential(estimate: Estimate) -> Estimate:
    """`exp` of an estimate by the delta method; capped where it would overflow."""
    value = math.exp(min(estimate.value, 700.0))
    return Estimate(value, value * estimate.influence)


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of several estimates over the same samples."""
    return Estimate(
        float(np.mean([estimate.value for estimate in estimates])),
        np.mean([estimate.influence for estimate in estimates], axis=0),
    )


def accuracy(predicted: Sequence[Hashable], expected: Sequence[Hashable]) -> Estimate:
    """The share of samples whose label is the expected one."""
    return mean([float(ours == theirs) for ours, theirs in zip(predicted, expected, strict=True)])


def macro_f1(predicted: Sequence[Hashable], expected: Sequence[Hashable]) -> Estimate:
    """Mean F1 of the classes the data has: scikit-learn's `f1_score(average="macro")` with these as `labels`.

    A class that is only predicted costs the recall of the one it is taken for, and is no class of its own: base and
    adapter are measured over the same classes.
    """
    numbers = {label: number for number, label in enumerate(dict.fromkeys(expected))}
    ours = np.array([numbers.get(label, -1) for label in predicted])
    theirs = np.array([numbers[label] for label in expected])
    by_class = [
        ratio(2.0 * ((ours == number) & (theirs == number)), (ours == number) * 1.0 + (theirs == number))
        for number in numbers.values()
    ]
    return average(by_class)


def span_f1(predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> Estimate:
    """F1 of the spans that IOB labels mark, over all sentences together: seqeval's `f1_score`.

    Args:
        predicted, expected: the labels of each sentence's tokens, `B-PER`, `I-PER`, `O` and the like.
    """
    pairs = [(spans(ours), spans(theirs)) for ours, theirs in zip(predicted, expected, strict=True)]
    return ratio(
        [2.0 * len(ours & theirs) for ours, theirs in pairs], [len(ours) + len(theirs) for ours, theirs in pairs]
    )


def spans(labels: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first, last) of every span in the labels of one sentence, read as CoNLL's script does: an `I-` that
    follows another type, or nothing, begins a span."""
    found, start, open_type = set(), 0, ""
    before = "O"
    for index, label in enumerate([*labels, "O"]):
        prefix, _, kind = label.partition("-")
        kind = kind or "_"
        inside = prefix not in ("O", "")
        begins = inside and (prefix in ("B", "S") or before in ("O", "E", "S") or kind != open_type)
        if open_type and (begins or not inside):
            found.add((open_type, start, index - 1))
            open_type = ""
        if begins:
            start, open_type = index, kind
        before = prefix if inside else "O"
    return found
