"""A base and its adapters on the same data: values, differences, and what each wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peftcli.data.report import choose_pad
from peftcli.errors import InputError
from peftcli.evaluation.answers import Answer, answers, end_tokens
from peftcli.evaluation.bench import Bench, Turn
from peftcli.evaluation.comparison import Comparison, Item, make_row
from peftcli.evaluation.estimates import Estimate, mean
from peftcli.evaluation.generate import StepProgress, generate
from peftcli.evaluation.judge import TAG_SEPARATOR, Judge, judge_rows
from peftcli.evaluation.metrics import Metric, TokenScores, Written
from peftcli.evaluation.score import score_tokens

if TYPE_CHECKING:
    from peftcli.data.tokens import TokenDataset

MIN_EXTRA_TOKENS = 16
"""How much longer than the longest expected answer a generated one may get, unless told otherwise."""
Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and out of how much."""


def compare(
    bench: Bench,
    tokenizer: Any,
    data: TokenDataset,
    metrics: Mapping[str, Metric],
    *,
    judge: Judge | None = None,
    generated: bool = False,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    bf16: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Measure a base and its adapters.

    Args:
        bench: base and adapters.
        tokenizer: the one `data` was tokenised with.
        data: at least one sample.
        metrics: by name.
        judge: of the data, for tasks other than a causal language model's.
        generated: generate answers although no metric needs them.
        max_new_tokens: of a generated answer; by default the longest expected answer and a little more.
        batch_size: rows of a batch at most.
        bf16: score under bfloat16 autocast, as training with `bf16: true` does.
        progress: told how far it got.

    Raises:
        InputError: a metric that the task does not have, or one of answers on data without answers.
    """
    _require_metrics(metrics, judge)
    writes = judge is None or judge.generates
    asked = [name for name, metric in metrics.items() if writes and metric.needs_answers]
    wanted = bool(asked) or (writes and generated)
    found = answers(data) if wanted else []
    if wanted and not found:
        raise InputError(
            "there is nothing to answer in this data: every token of it is learnt",
            place=", ".join(asked) or None,
            fix="use data with prompts and answers (loss_on: assistant), or the metrics loss, perplexity",
        )
    pad = choose_pad(tokenizer)
    limit = max_new_tokens or max((len(answer.expected) for answer in found), default=0) + MIN_EXTRA_TOKENS
    seen = _Seen()
    for turn in bench.turns() if judge is None or judge.mixes else bench.one_by_one():
        step = _named(progress, f"{', '.join(turn.columns)}: scoring")
        if judge is not None:
            seen.note_judged(turn, judge_rows(judge, turn.model, pad, adapters=turn.adapters, progress=step))
        elif len(asked) < len(metrics):
            rows: dict[str, Any] = {"adapters": turn.adapters, "batch_size": batch_size, "progress": step}
            seen.scores |= zip(turn.columns, score_tokens(turn.model, data, pad, bf16=bf16, **rows), strict=True)
        if found:
            written = generate(
                turn.model,
                [answer.prompt for answer in found],
                end_tokens=end_tokens(found, tokenizer),
                pad_token_id=pad,
                max_new_tokens=limit,
                batch_size=batch_size,
                adapters=turn.adapters,
                tasks=None if data.tasks is None else [int(data.tasks[answer.sample]) for answer in found],
                progress=_named(progress, f"{', '.join(turn.columns)}: answering"),
            )
            seen.written |= zip(turn.columns, written, strict=True)
    return _result(bench, tokenizer, metrics, judge, found, seen)


@dataclass
class _Seen:
    """What was seen so far, by column: scores of labels, what judges were told, what was written."""

    scores: dict[str, TokenScores] = field(default_factory=dict)
    judged: dict[str, list[str]] = field(default_factory=dict)
    written: dict[str, list[Written]] = field(default_factory=dict)

    def note_judged(self, turn: Turn, found: list[tuple[TokenScores, list[str]]]) -> None:
        for column, (scores, texts) in zip(turn.columns, found, strict=True):
            self.scores[column], self.judged[column] = scores, texts


def _result(
    bench: Bench,
    tokenizer: Any,
    metrics: Mapping[str, Metric],
    judge: Judge | None,
    found: list[Answer],
    seen: _Seen,
) -> Comparison:
    """Rows, items and notes, columns in their order."""
    columns, scores = bench.columns, seen.scores
    if judge is not None and not judge.generates:
        items = _judged_items(judge, {column: seen.judged[column] for column in columns}, metrics)
    else:
        items = _items(found, {column: seen.written[column] for column in columns if found}, tokenizer, metrics)
    rows = [
        make_row(name, metric, {column: _estimate(name, metric, column, scores, items) for column in columns})
        for name, metric in metrics.items()
    ]
    losses = {column: scores[column].losses / scores[column].counts for column in columns if column in scores}
    notes = [f"{column} is measured by itself: {reason}" for column, reason in bench.alone.items()]
    notes = (notes if len(columns) > 2 else []) + ([judge.note] if judge is not None and judge.note else [])
    return Comparison(columns[1:], rows, items, losses, notes)


def _require_metrics(metrics: Mapping[str, Metric], judge: Judge | None) -> None:
    """Raises:
    InputError: a metric that the task does not have.
    """
    for name, metric in metrics.items():
        if judge is None or judge.generates:
            if metric.of_spans is not None:
                raise InputError("is a metric of token labels, which a language model does not give", field=name)
        elif name not in judge.metrics:
            raise InputError("is no metric of this task", field=name, allowed=", ".join(judge.metrics))


def _judged_items(judge: Judge, judged: dict[str, list[str]], metrics: Mapping[str, Metric]) -> list[Item]:
    items = []
    for number, (index, *_) in enumerate(judge.data.questions):
        question, expected = judge.question(index), judge.accepted(index)
        texts = {column: answers[number] for column, answers in judged.items()}
        scores = {column: _judged(text, expected, metrics) for column, text in texts.items()}
        items.append(Item(index, question, question, expected, texts, scores, {column: {} for column in texts}))
    return items


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
        elif metric.of_labels is not None or metric.of_spans is not None:
            found[name] = float(text.strip() == expected[0].strip())
    return found


def _estimate(name: str, metric: Metric, column: str, scores: dict[str, TokenScores], items: list[Item]) -> Estimate:
    if metric.of_tokens is not None:
        return metric.of_tokens(scores[column])
    if metric.of_labels is not None:
        predicted = [item.answers[column].strip() for item in items]
        return metric.of_labels(predicted, [item.expected[0].strip() for item in items])
    if metric.of_spans is not None:
        tags = [[text.split(TAG_SEPARATOR) for text in (item.answers[column], item.expected[0])] for item in items]
        return metric.of_spans([ours for ours, _ in tags], [theirs for _, theirs in tags])
    return mean([(item.writing if metric.of_writing else item.scores)[column][name] for item in items])


def _named(progress: Progress | None, what: str) -> StepProgress | None:
    return None if progress is None else lambda done, total: progress(what, done, total)
