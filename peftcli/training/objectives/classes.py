"""Sequence and token classification: cross entropy over classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.data.collate import IGNORED
from peftcli.evaluation.estimates import spans
from peftcli.training.objectives.base import Objective, cross_entropy, inputs_of, summed


class ClassLoss(Objective):
    """SEQ_CLS: the class of each sample.

    Sums: loss, samples, right ones; by class: right, predicted, true ones.
    """

    def forward(self, batch: dict[str, Tensor], score: bool = False) -> Tensor:
        target = batch["targets"][:, 0]
        with self.autocast(target.device):
            logits = self.model(**inputs_of(batch)).logits
        if not score:
            return cross_entropy(logits, target)
        real = target != IGNORED
        logits, target = logits[real], target[real]
        predicted, classes = logits.argmax(-1), logits.shape[-1]
        right = torch.bincount(target[predicted == target], minlength=classes)
        found, true = (torch.bincount(labels, minlength=classes) for labels in (predicted, target))
        return summed(cross_entropy(logits, target), len(target), right.sum(), right, found, true)

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Macro F1 is the mean over classes that occur or are predicted, as scikit-learn has it."""
        classes = (len(sums) - 3) // 3
        right, found, true = (sums[3 + part * classes : 3 + (part + 1) * classes] for part in range(3))
        f1 = [2 * r / (f + t) for r, f, t in zip(right, found, true, strict=True) if f + t]
        return {**super().metrics(sums), "eval_accuracy": sums[2] / sums[1], "eval_macro_f1": sum(f1) / len(f1)}


class TagLoss(Objective):
    """TOKEN_CLS: the class of each word, at its first token.

    Sums: loss, words, right ones, right spans, predicted spans, true spans.

    Args:
        labels: names of the classes; spans are read from them where they are IOB tags.
    """

    def __init__(self, model: nn.Module, labels: Sequence[str], **options: Any) -> None:
        super().__init__(model, **options)
        self.labels = list(labels)

    def forward(self, batch: dict[str, Tensor], score: bool = False) -> Tensor:
        labels = batch["labels"]
        keep = labels != IGNORED
        with self.autocast(labels.device):
            logits = self.model(**inputs_of(batch)).logits
        loss = cross_entropy(logits[keep], labels[keep])
        if not score:
            return loss
        predicted = logits.argmax(-1)
        right = found = true = 0
        for row in range(len(labels)):
            names = ([self.labels[index] for index in ids[row][keep[row]].tolist()] for ids in (predicted, labels))
            ours, theirs = (spans(sentence) for sentence in names)
            right, found, true = right + len(ours & theirs), found + len(ours), true + len(theirs)
        return summed(loss, keep.sum(), (predicted == labels)[keep].sum(), right, found, true)

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Span F1 is seqeval's, over all sentences; 0 where there is no span."""
        _, count, correct, right, found, true = sums
        f1 = 2 * right / (found + true) if found + true else 0.0
        return {**super().metrics(sums), "eval_token_accuracy": correct / count, "eval_span_f1": f1}
