"""Encoder-decoders: the next token of the target."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor  # noqa: TID253

from peftcli.data.collate import IGNORED
from peftcli.training.objectives.base import Objective, cross_entropy, inputs_of, summed, token_metrics


class Seq2SeqLoss(Objective):
    """SEQ_2_SEQ_LM. The model itself shifts its labels to the right for the decoder.

    Sums: loss, tokens, right ones.
    """

    def forward(self, batch: dict[str, Tensor], score: bool = False) -> Tensor:
        labels = batch["second_labels"]
        keep = labels != IGNORED
        with self.autocast(labels.device):
            # The decoder needs ids also where nothing is learnt: an ignored label alone would be its pad token.
            logits = self.model(**inputs_of(batch), labels=labels, use_cache=False).logits[:, -labels.shape[1] :]
        loss = cross_entropy(logits[keep], labels[keep])
        if not score:
            return loss
        return summed(loss, keep.sum(), (logits.argmax(-1) == labels)[keep].sum())

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        loss, count, correct = sums
        return token_metrics(loss, correct, count)
