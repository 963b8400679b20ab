"""Embeddings from pairs: each anchor is nearer to its own positive than to the others of its batch.

The loss is InfoNCE over the batch (van den Oord et al., arXiv:1807.03748), which sentence-transformers calls
MultipleNegativesRankingLoss. Unlike other losses it depends on which samples share a batch, and on how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.data.collate import IGNORED
from peftcli.training.objectives.base import Objective, cross_entropy, inputs_of, summed


class PairLoss(Objective):
    """FEATURE_EXTRACTION.

    Sums: loss, pairs, those whose positive is the nearest.

    Args:
        temperature: cosine similarities are divided by it.
    """

    def __init__(self, model: nn.Module, temperature: float, **options: Any) -> None:
        super().__init__(model, **options)
        self.temperature = temperature

    def forward(self, batch: dict[str, Tensor], score: bool = False) -> Tensor:
        real = batch["targets"][:, 0] != IGNORED
        similarities = self.similarities(batch)
        own = torch.where(real, torch.arange(len(real), device=real.device), IGNORED)
        loss = cross_entropy(similarities, own)
        if not score:
            return loss
        return summed(loss, real.sum(), (similarities.argmax(-1) == own).sum())

    def similarities(self, batch: dict[str, Tensor]) -> Tensor:
        """Of every anchor with every positive of the batch [B, B], by temperature."""
        anchors, positives = (self._embedded(inputs_of(batch, prefix)) for prefix in ("", "second_"))
        return anchors @ positives.T / self.temperature

    def _embedded(self, inputs: dict[str, Tensor]) -> Tensor:
        """Embeddings [B, D] of unit length: the mean over tokens, padding left out."""
        with self.autocast(inputs["input_ids"].device):
            hidden = self.model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden[:, -mask.shape[1] :] * mask).sum(1) / mask.sum(1), dim=-1)

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        return {**super().metrics(sums), "eval_accuracy": sums[2] / sums[1]}
