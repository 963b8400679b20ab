"""The metrics of `peft eval`, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftcli.errors import InputError, nearest, printable
from peftcli.evaluation import estimates, texts
from peftcli.evaluation.estimates import Estimate, exponential, ratio

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenScores:
    """What a model made of the labels, by sample.

    Args:
        losses: [n] float64, summed negative log-likelihoods in nats.
        counts: [n] int64, labels: learnt tokens, or one for each sample that is classified.
        correct: [n] int64, labels that the model ranks first.
    """

    losses: NDArray[np.float64]
    counts: NDArray[np.int64]
    correct: NDArray[np.int64]


@dataclass(frozen=True)
class Written:
    """One generated answer.

    Args:
        tokens: without the one that ended it.
        stopped: whether a token ended it, and not the limit of its length.
    """

    tokens: list[int]
    stopped: bool


@dataclass(frozen=True)
class Metric:
    """One metric; exactly one of the functions is given, and says what it is computed from.

    Args:
        higher_is_better: the good direction.
        meaning: a few words for people.
        of_tokens: the estimate from the scores of labels.
        of_answer: 0 to 1 for one answer from (generated, expected); of several expected answers the best counts.
        of_writing: 0 to 1 for one generated answer, whatever was expected.
        of_labels: the estimate from (predicted, expected) labels; a language model's are its answers.
        of_spans: the estimate from (predicted, expected) lists of token labels.
    """

    higher_is_better: bool
    meaning: str
    of_tokens: Callable[[TokenScores], Estimate] | None = None
    of_answer: Callable[[str, str], float] | None = None
    of_writing: Callable[[Written], float] | None = None
    of_labels: Callable[[Sequence[Hashable], Sequence[Hashable]], Estimate] | None = None
    of_spans: Callable[[Sequence[Sequence[str]], Sequence[Sequence[str]]], Estimate] | None = None

    @property
    def needs_answers(self) -> bool:
        """Whether a language model has to write answers for it."""
        return not (self.of_tokens or self.of_spans)


def reaches(higher_is_better: bool, value: float, threshold: float) -> bool:
    """Whether a metric's value is at least as good as `threshold`; NaN never is."""
    return value >= threshold if higher_is_better else value <= threshold


def loss(scores: TokenScores) -> Estimate:
    """Mean negative log-likelihood of a label, in nats."""
    return ratio(scores.losses, scores.counts)


def perplexity(scores: TokenScores) -> Estimate:
    """exp(loss)."""
    return exponential(loss(scores))


def token_accuracy(scores: TokenScores) -> Estimate:
    """The share of labels that the model ranks first, given everything before them."""
    return ratio(scores.correct, scores.counts)


METRICS = {
    "loss": Metric(False, "negative log-likelihood of a learnt token", of_tokens=loss),
    "perplexity": Metric(False, "exp(loss)", of_tokens=perplexity),
    "token_accuracy": Metric(True, "learnt tokens ranked first", of_tokens=token_accuracy),
    "exact_match": Metric(True, "answers that are the expected one", of_answer=texts.exact_match),
    "contains": Metric(True, "answers with the expected one in them", of_answer=texts.contains),
    "rouge_l": Metric(True, "ROUGE-L: F1 of the longest common run of words", of_answer=texts.rouge_l),
    "f1": Metric(True, "F1 of the words shared", of_answer=texts.token_f1),
    "qa_em": Metric(True, "SQuAD's exact match", of_answer=texts.qa_em),
    "qa_f1": Metric(True, "SQuAD's F1 of words", of_answer=texts.qa_f1),
    "accuracy": Metric(True, "labels that are right", of_labels=estimates.accuracy),
    "macro_f1": Metric(True, "mean F1 of the classes", of_labels=estimates.macro_f1),
    "span_f1": Metric(True, "F1 of spans, as in seqeval", of_spans=estimates.span_f1),
    "stop_rate": Metric(True, "answers that end by themselves", of_writing=lambda answer: float(answer.stopped)),
    "repetition": Metric(
        False, "runs of four tokens that come again", of_writing=lambda answer: texts.repetition(answer.tokens)
    ),
}
DEFAULTS = {
    "SEQ_CLS": "loss,accuracy,macro_f1",
    "TOKEN_CLS": "loss,token_accuracy,span_f1",
    "QUESTION_ANS": "loss,qa_em,qa_f1",
    "FEATURE_EXTRACTION": "loss,accuracy",
    "preference": "loss,accuracy",
}
"""What tasks are measured by unless told otherwise; others by loss and perplexity."""
REGEX = "regex"
"""The metric that a pattern makes."""


def default_metrics(task: str) -> str:
    """Names, separated by commas."""
    return DEFAULTS.get(task, "loss,perplexity")


def known_metrics(pattern: str | None = None, field: str = "--regex") -> dict[str, Metric]:
    """Every metric by name, `regex` among them if there is a pattern.

    Raises:
        InputError: the pattern is no regular expression.
    """
    if pattern is None:
        return METRICS
    score = texts.pattern_match(pattern, field)
    return {**METRICS, REGEX: Metric(True, f"answers with {printable(pattern, 60)}", of_answer=score)}


def find(name: str, field: str, known: dict[str, Metric] | None = None) -> Metric:
    """The metric of that name.

    Raises:
        InputError: there is none; names `field` and those there are.
    """
    known = known or METRICS
    if name == REGEX and name not in known:
        raise InputError("the metric regex needs a pattern", field=field, fix="give it: --regex PATTERN")
    if name not in known:
        raise InputError(
            f"{printable(repr(name))} is not a metric",
            field=field,
            allowed=", ".join([*METRICS, REGEX]),
            fix=str(nearest(name, [*METRICS, REGEX])) or None,
        )
    return known[name]


def plain(value: float) -> Any:
    """A number as JSON can hold it: None where it is not finite."""
    return value if math.isfinite(value) else None
