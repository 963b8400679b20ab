"""A base and its adapter on the same data, in one model: the adapter is switched off for the base's turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftcli.data.report import choose_pad
from peftcli.errors import InputError
from peftcli.evaluation import metrics as known
from peftcli.evaluation.answers import Answer, answers, end_tokens
from peftcli.evaluation.generate import StepProgress, generate
from peftcli.evaluation.metrics import Estimate, TokenScores, plain
from peftcli.lazy import numpy as np
from peftcli.lazy import torch

if TYPE_CHECKING:
    from peftcli.data.tokens import TokenDataset

MIN_EXTRA_TOKENS = 16
"""How much longer than the longest expected answer a generated one may get, unless told otherwise."""

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and out of how much."""


@dataclass(frozen=True)
class Row:
    """One metric of base and adapter over `count` tokens' samples or answers."""

    metric: str
    count: int
    base: Estimate
    tuned: Estimate

    @property
    def delta(self) -> Estimate:
        return self.tuned - self.base

    def to_dict(self) -> dict[str, Any]:
        numbers = {"base": self.base, "tuned": self.tuned, "delta": self.delta}
        values = {name: plain(estimate.value) for name, estimate in numbers.items()}
        errors = {f"{name}_standard_error": plain(estimate.standard_error) for name, estimate in numbers.items()}
        return {"metric": self.metric, "n": self.count, **values, **errors}


@dataclass(frozen=True)
class Item:
    """One question with what was expected and what both wrote.

    Args:
        prompt: what the model was given, control tokens and all.
        question: the same without them, for people.
        base_scores, tuned_scores: by metric of answers, 0 to 1.
    """

    prompt: str
    question: str
    expected: str
    base: str
    tuned: str
    base_scores: dict[str, float]
    tuned_scores: dict[str, float]

    @property
    def is_lost(self) -> bool:
        """Whether the base was better by some metric."""
        return any(self.base_scores[name] > score for name, score in self.tuned_scores.items())


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `items` is empty where nothing was generated."""

    rows: list[Row]
    items: list[Item]

    @property
    def lost(self) -> list[Item]:
        """Items the base had right and the adapter wrong."""
        return [item for item in self.items if item.is_lost]

    def missed(self, thresholds: dict[str, float]) -> list[str]:
        """A sentence for each threshold that the adapter does not reach."""
        by_name = {row.metric: row.tuned.value for row in self.rows}
        return [
            f"{name} is {by_name[name]:.4g}, not {'at least' if known.METRICS[name].higher_is_better else 'at most'} {threshold:g}"
            for name, threshold in thresholds.items()
            if not known.METRICS[name].reaches(by_name[name], threshold)
        ]

    def to_dict(self) -> dict[str, Any]:
        return {"metrics": [row.to_dict() for row in self.rows], "items": [vars(item) for item in self.items]}


def compare(
    model: Any,
    tokenizer: Any,
    data: TokenDataset,
    metrics: Sequence[str],
    *,
    generated: bool = False,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    bf16: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Measure base and adapter.

    Args:
        model: a PeftModel of a causal language model; it comes back in eval mode.
        tokenizer: the one `data` was tokenised with.
        data: at least one sample.
        metrics: names in `peftcli.evaluation.metrics.METRICS`.
        generated: generate answers although no metric needs them.
        max_new_tokens: of a generated answer; by default the longest expected answer and a little more.
        batch_size: prompts generated for at a time.
        bf16: score under bfloat16 autocast, as training with `bf16: true` does.
        progress: told how far it got.

    Raises:
        InputError: an unknown metric, or one of answers on data without answers.
    """
    chosen = {name: known.find(name, "metrics") for name in dict.fromkeys(metrics)}
    asked = [name for name, metric in chosen.items() if metric.needs_answers]
    found = answers(data) if asked or generated else []
    if (asked or generated) and not found:
        raise InputError(
            "there is nothing to answer in this data: every token of it is learnt",
            place=", ".join(asked) or None,
            fix="use data with prompts and answers (loss_on: assistant), or the metrics loss, perplexity",
        )
    model.eval()
    pad = choose_pad(tokenizer)
    stop = end_tokens(found, tokenizer)
    limit = max_new_tokens or max((len(answer.expected) for answer in found), default=0) + MIN_EXTRA_TOKENS
    scores, texts = {}, {}
    for side, switch in (("base", model.disable_adapter), ("tuned", nullcontext)):
        with switch():
            if len(asked) < len(chosen):
                scores[side] = score_tokens(model, data, pad, bf16=bf16, progress=_named(progress, f"{side}: scoring"))
            if found:
                written = generate(
                    model,
                    [answer.prompt for answer in found],
                    end_tokens=stop,
                    pad_token_id=pad,
                    max_new_tokens=limit,
                    batch_size=batch_size,
                    progress=_named(progress, f"{side}: answering"),
                )
                texts[side] = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
    items = _items(found, texts, tokenizer, asked) if found else []
    return Comparison([_row(name, metric, scores, items) for name, metric in chosen.items()], items)


def score_tokens(
    model: Any,
    data: TokenDataset,
    pad_token_id: int,
    *,
    bf16: bool = False,
    progress: StepProgress | None = None,
) -> TokenScores:
    """The loss of every sample; one sample a forward pass, since errors need each sample's own loss."""
    from peftcli.training.batches import to_batch
    from peftcli.training.losses import CausalLMLoss

    loss = CausalLMLoss(model, bf16=bf16)
    losses = np.zeros(len(data))
    with torch.no_grad():
        for index in range(len(data)):
            batch = to_batch(data, [index], pad_token_id, model.device)
            losses[index] = float(loss(batch, score=True)[0])
            if progress is not None:
                progress(index + 1, len(data))
    return TokenScores(losses, data.label_counts)


def _items(found: list[Answer], texts: dict[str, list[str]], tokenizer: Any, asked: list[str]) -> list[Item]:
    items = []
    for answer, base, tuned in zip(found, texts["base"], texts["tuned"], strict=True):
        expected = tokenizer.decode(answer.expected.tolist(), skip_special_tokens=True)
        score = {name: known.METRICS[name].of_answer for name in asked}
        items.append(
            Item(
                prompt=tokenizer.decode(answer.prompt.tolist()),
                question=tokenizer.decode(answer.prompt.tolist(), skip_special_tokens=True),
                expected=expected,
                base=base,
                tuned=tuned,
                base_scores={name: function(base, expected) for name, function in score.items() if function},
                tuned_scores={name: function(tuned, expected) for name, function in score.items() if function},
            )
        )
    return items


def _row(name: str, metric: known.Metric, scores: dict[str, TokenScores], items: list[Item]) -> Row:
    if metric.of_tokens is not None:
        return Row(
            name, len(scores["base"].counts), metric.of_tokens(scores["base"]), metric.of_tokens(scores["tuned"])
        )
    base = known.mean([item.base_scores[name] for item in items])
    tuned = known.mean([item.tuned_scores[name] for item in items])
    return Row(name, len(items), base, tuned)


def _named(progress: Progress | None, what: str) -> StepProgress | None:
    return None if progress is None else lambda done, total: progress(what, done, total)
