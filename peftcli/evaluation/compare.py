"""A base and its adapters on the same data: values, differences, and what each wrote."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peftcli.data.report import choose_pad
from peftcli.errors import InputError
from peftcli.evaluation.answers import Answer, answers, end_tokens
from peftcli.evaluation.bench import BASE_COLUMN, Bench
from peftcli.evaluation.estimates import Estimate, mean
from peftcli.evaluation.generate import StepProgress, generate
from peftcli.evaluation.metrics import Metric, TokenScores, Written, plain
from peftcli.evaluation.score import score_tokens
from peftcli.evaluation.significance import PairedTest, paired_test

if TYPE_CHECKING:
    from peftcli.data.tokens import TokenDataset

MIN_EXTRA_TOKENS = 16
"""How much longer than the longest expected answer a generated one may get, unless told otherwise."""
WRONG = 0.5
"""An answer with a score below this is wrong; one with 1 is right."""

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and out of how much."""


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
        sample: its index in the data.
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
                if not (value >= threshold if row.higher_is_better else value <= threshold):
                    of = f" of {column}" if len(self.columns) > 1 else ""
                    yield f"{name}{of} is {value:.4g}, not {bound} {threshold:g}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "notes": self.notes,
            "metrics": [row.to_dict() for row in self.rows],
            "items": [vars(item) for item in self.items],
        }


def compare(
    bench: Bench,
    tokenizer: Any,
    data: TokenDataset,
    metrics: Mapping[str, Metric],
    *,
    generated: bool = False,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    bf16: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Measure a causal language model and its adapters.

    Args:
        bench: base and adapters.
        tokenizer: the one `data` was tokenised with.
        data: at least one sample.
        metrics: by name.
        generated: generate answers although no metric needs them.
        max_new_tokens: of a generated answer; by default the longest expected answer and a little more.
        batch_size: rows of a batch at most.
        bf16: score under bfloat16 autocast, as training with `bf16: true` does.
        progress: told how far it got.

    Raises:
        InputError: a metric of answers on data without answers.
    """
    for name, metric in metrics.items():
        if metric.of_spans is not None:
            raise InputError("is a metric of token labels, which a language model does not give", field=name)
    asked = [name for name, metric in metrics.items() if metric.needs_answers]
    found = answers(data) if asked or generated else []
    if (asked or generated) and not found:
        raise InputError(
            "there is nothing to answer in this data: every token of it is learnt",
            place=", ".join(asked) or None,
            fix="use data with prompts and answers (loss_on: assistant), or the metrics loss, perplexity",
        )
    pad = choose_pad(tokenizer)
    limit = max_new_tokens or max((len(answer.expected) for answer in found), default=0) + MIN_EXTRA_TOKENS
    scores: dict[str, TokenScores] = {}
    written: dict[str, list[Written]] = {}
    for turn in bench.turns():
        who = ", ".join(turn.columns)
        rows: dict[str, Any] = {"adapters": turn.adapters, "batch_size": batch_size}
        if len(asked) < len(metrics):
            step = _named(progress, f"{who}: scoring")
            scored = score_tokens(turn.model, data, pad, bf16=bf16, progress=step, **rows)
            scores |= zip(turn.columns, scored, strict=True)
        if found:
            texts = generate(
                turn.model,
                [answer.prompt for answer in found],
                end_tokens=end_tokens(found, tokenizer),
                pad_token_id=pad,
                max_new_tokens=limit,
                tasks=None if data.tasks is None else [int(data.tasks[answer.sample]) for answer in found],
                progress=_named(progress, f"{who}: answering"),
                **rows,
            )
            written |= zip(turn.columns, texts, strict=True)
    columns = bench.columns
    items = _items(found, {column: written[column] for column in columns}, tokenizer, metrics) if found else []
    rows_found = [
        make_row(name, metric, {column: _estimate(name, metric, column, scores, items) for column in columns})
        for name, metric in metrics.items()
    ]
    losses = {column: scores[column].losses / scores[column].counts for column in columns if column in scores}
    notes = [f"{column} is measured by itself: {reason}" for column, reason in bench.alone.items()]
    return Comparison(columns[1:], rows_found, items, losses, notes if len(columns) > 2 else [])


def _items(
    found: list[Answer], written: dict[str, list[Written]], tokenizer: Any, metrics: Mapping[str, Metric]
) -> list[Item]:
    items = []
    for index, answer in enumerate(found):
        own = {column: texts[index] for column, texts in written.items()}
        expected = [tokenizer.decode(answer.expected.tolist(), skip_special_tokens=True)]
        texts = {column: tokenizer.decode(one.tokens, skip_special_tokens=True) for column, one in own.items()}
        items.append(
            Item(
                sample=answer.sample,
                prompt=tokenizer.decode(answer.prompt.tolist()),
                question=tokenizer.decode(answer.prompt.tolist(), skip_special_tokens=True),
                expected=expected,
                answers=texts,
                scores={column: _judged(text, expected, metrics) for column, text in texts.items()},
                writing={
                    column: {name: metric.of_writing(one) for name, metric in metrics.items() if metric.of_writing}
                    for column, one in own.items()
                },
            )
        )
    return items


def _judged(text: str, expected: list[str], metrics: Mapping[str, Metric]) -> dict[str, float]:
    """How right an answer is, by each metric that has a say; of several expected answers the best counts."""
    found = {}
    for name, metric in metrics.items():
        if metric.of_answer is not None:
            found[name] = max(metric.of_answer(text, one) for one in expected)
        elif metric.of_labels is not None:
            found[name] = float(text.strip() == expected[0].strip())
    return found


def _estimate(name: str, metric: Metric, column: str, scores: dict[str, TokenScores], items: list[Item]) -> Estimate:
    if metric.of_tokens is not None:
        return metric.of_tokens(scores[column])
    if metric.of_labels is not None:
        predicted = [item.answers[column].strip() for item in items]
        return metric.of_labels(predicted, [item.expected[0].strip() for item in items])
    return mean([(item.writing if metric.of_writing else item.scores)[column][name] for item in items])


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


def _named(progress: Progress | None, what: str) -> StepProgress | None:
    return None if progress is None else lambda done, total: progress(what, done, total)
