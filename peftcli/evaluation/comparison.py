"""What an evaluation found: values and differences by metric, answers by question."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from peftcli.evaluation.bench import BASE_COLUMN
from peftcli.evaluation.estimates import Estimate
from peftcli.evaluation.metrics import Metric, plain, reaches
from peftcli.evaluation.significance import PairedTest, paired_test

WRONG = 0.5
"""An answer with a score below this is wrong; one with 1 is right."""


@dataclass(frozen=True)
class Row:
    """One metric over `count` samples or answers.

    Args:
        base: the base's.
        adapters: each adapter's, by its column.
    """

    metric: str
    higher_is_better: bool
    count: int
    base: Estimate
    adapters: dict[str, Estimate]

    def delta(self, column: str) -> Estimate:
        return self.adapters[column] - self.base

    def test(self, column: str) -> PairedTest:
        return paired_test(self.adapters[column], self.base)

    def between(self) -> Iterator[tuple[str, str, Estimate, PairedTest]]:
        """Every two adapters: their columns, the first's difference from the second, and its test."""
        for one, other in itertools.combinations(self.adapters, 2):
            ours, theirs = self.adapters[one], self.adapters[other]
            yield one, other, ours - theirs, paired_test(ours, theirs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "n": self.count,
            "base": _numbers(self.base),
            "adapters": {column: self._beside_base(column) for column in self.adapters},
            "between": [
                {"adapters": [one, other], **_compared(delta, test)} for one, other, delta, test in self.between()
            ],
        }

    def _beside_base(self, column: str) -> dict[str, Any]:
        return {**_numbers(self.adapters[column]), **_compared(self.delta(column), self.test(column))}


@dataclass(frozen=True)
class Item:
    """One question with what was expected and what everyone wrote.

    Args:
        sample: its index in the data; of several windows the first one's.
        prompt: what the models were given, control tokens and all.
        question: the same without them, for people.
        expected: the answers that are right.
        answers: by column, the base's among them.
        scores: by column, then by metric, how right the answer is, 0 to 1.
        writing: by column, then by metric, what is measured of the answer whether it is right or not.
    """

    sample: int
    prompt: str
    question: str
    expected: list[str]
    answers: dict[str, str]
    scores: dict[str, dict[str, float]]
    writing: dict[str, dict[str, float]]

    def is_lost(self, column: str) -> bool:
        """Whether the base had it right and an adapter has it wrong, by some metric."""
        return self._only(BASE_COLUMN, column)

    def is_gained(self, column: str) -> bool:
        """The other way round."""
        return self._only(column, BASE_COLUMN)

    def _only(self, right: str, wrong: str) -> bool:
        return any(score == 1 and self.scores[wrong][name] < WRONG for name, score in self.scores[right].items())


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `items` is empty where nothing was generated.

    Args:
        columns: the adapters', in order.
        losses: loss per label of each sample, by column, where tokens were scored.
        notes: what a reader should know about how it was done.
    """

    columns: tuple[str, ...]
    rows: list[Row]
    items: list[Item]
    losses: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lost(self, column: str) -> list[Item]:
        """Items the base had right and the adapter wrong."""
        return [item for item in self.items if item.is_lost(column)]

    def gained(self, column: str) -> list[Item]:
        """Items the adapter has right and the base had wrong."""
        return [item for item in self.items if item.is_gained(column)]

    def missed(self, thresholds: Mapping[str, float]) -> list[str]:
        """A sentence for each threshold that an adapter does not reach."""
        return list(self._missed(thresholds))

    def _missed(self, thresholds: Mapping[str, float]) -> Iterator[str]:
        rows = {row.metric: row for row in self.rows}
        for name, threshold in thresholds.items():
            row = rows[name]
            bound = "at least" if row.higher_is_better else "at most"
            for column, estimate in row.adapters.items():
                value = estimate.value
                if not reaches(row.higher_is_better, value, threshold):
                    of = f" of {column}" if len(self.columns) > 1 else ""
                    yield f"{name}{of} is {value:.4g}, not {bound} {threshold:g}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "notes": self.notes,
            "metrics": [row.to_dict() for row in self.rows],
            "items": [vars(item) for item in self.items],
        }


def make_row(name: str, metric: Metric, found: Mapping[str, Estimate]) -> Row:
    """A metric's row from the estimate of every column."""
    base = found[BASE_COLUMN]
    adapters = {column: estimate for column, estimate in found.items() if column != BASE_COLUMN}
    return Row(name, metric.higher_is_better, len(base.influence), base, adapters)


def _numbers(estimate: Estimate) -> dict[str, Any]:
    return {"value": plain(estimate.value), "standard_error": plain(estimate.standard_error)}


def _compared(delta: Estimate, test: PairedTest) -> dict[str, Any]:
    return {
        "delta": plain(delta.value),
        "delta_standard_error": plain(delta.standard_error),
        "p": plain(test.p),
        "test": test.name,
        **({} if test.gained is None else {"gained": test.gained, "lost": test.lost}),
    }
