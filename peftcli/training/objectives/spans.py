"""Extractive question answering: where the answer begins and ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253

from peftcli.data.collate import IGNORED
from peftcli.training.objectives.base import Objective, cross_entropy, inputs_of, summed

LONGEST_ANSWER = 64  # tokens


class SpanLoss(Objective):
    """QUESTION_ANS: the mean of two cross entropies over positions, a sample.

    Sums: loss, samples, exact ones, F1 of tokens; of several answers that are right the best counts, and the first is learnt.
    """

    def forward(self, batch: dict[str, Tensor], score: bool = False) -> Tensor:
        targets = batch["targets"]
        with self.autocast(targets.device):
            outputs = self.model(**inputs_of(batch))
        start, end = span_logits(outputs, batch)
        loss = (cross_entropy(start, targets[:, 0]) + cross_entropy(end, targets[:, 1])) / 2
        if not score:
            return loss
        real = targets[:, 0] != IGNORED
        firsts, lasts = targets[real, ::2], targets[real, 1::2]  # [B, answers]
        first, last = (found.unsqueeze(1) for found in best_span(start[real], end[real]))
        exact = ((first == firsts) & (last == lasts)).any(1)
        shared = (torch.minimum(last, lasts) - torch.maximum(first, firsts) + 1).clamp(min=0)
        lengths = (last - first + 1) + (lasts - firsts + 1)
        return summed(loss, len(firsts), exact.sum(), (2 * shared / lengths).amax(1).sum())

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """By positions, each window of a long context by itself; `peft eval` compares texts of questions, as SQuAD does."""
        _, count, exact, f1 = sums
        return {**super().metrics(sums), "eval_window_exact_match": exact / count, "eval_window_f1": f1 / count}


def span_logits(outputs: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of the first and the last token [B, T], padding out of the question."""
    padding = batch["attention_mask"] == 0
    lowest = torch.finfo(torch.float32).min
    start, end = (logits.float().masked_fill(padding, lowest) for logits in (outputs.start_logits, outputs.end_logits))
    return start, end


def best_span(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """First and last token [B] of the likeliest span of at most `LONGEST_ANSWER` tokens, from logits [B, T]."""
    both = start.unsqueeze(2) + end.unsqueeze(1)  # [B, T, T]
    allowed = torch.ones(both.shape[1:], dtype=torch.bool, device=both.device).triu().tril(LONGEST_ANSWER - 1)
    best = both.masked_fill(~allowed, -torch.inf).flatten(1).argmax(-1)
    return best // both.shape[2], best % both.shape[2]
