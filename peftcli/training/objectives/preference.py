"""Preferences: of two answers the first becomes likelier than the second.

DPO (Rafailov et al., arXiv:2305.18290) measures both against a reference. Here that is the same model with its adapter
switched off, so no second copy is held. ORPO (Hong et al., arXiv:2403.07691) needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253
from torch.nn.functional import logsigmoid, pad  # noqa: TID253

from peftcli.data.collate import IGNORED
from peftcli.recipe.schema import PreferenceSection
from peftcli.training.objectives.base import Objective, inputs_of, summed


class PreferenceLoss(Objective):
    """What both share. Sums: loss, pairs, those with the preferred answer ahead, margins."""

    def __init__(self, model: nn.Module, section: PreferenceSection, **options: Any) -> None:
        super().__init__(model, **options)
        self.section = section

    def forward(self, batch: dict[str, Tensor], score: bool = False) -> Tensor:
        real = batch["targets"][:, 0] != IGNORED
        losses, margins = self.compare(_together(batch))
        loss = losses[real].sum() if real.any() else losses.sum() * 0
        if not score:
            return loss
        return summed(loss, real.sum(), (margins[real] > 0).sum(), margins[real].sum())

    def compare(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss and margin [B] of each pair.

        Args:
            batch: the preferred answers, then the rejected ones [2B, T].
        """
        raise NotImplementedError

    def log_likelihoods(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of each row [2B] the sum of its learnt tokens' log likelihoods, and their number."""
        labels = batch["labels"][:, 1:]
        keep = labels != IGNORED
        with self.autocast(labels.device):
            logits = self.model(**inputs_of(batch), use_cache=False).logits
        logits = logits[:, -labels.shape[1] - 1 : -1][keep]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found = wide.gather(-1, labels[keep].unsqueeze(-1)).squeeze(-1) - wide.logsumexp(-1)
        rows = keep.nonzero()[:, 0]
        return found.new_zeros(len(labels)).index_add(0, rows, found), keep.sum(-1)

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        _, count, ahead, margin = sums
        return {**super().metrics(sums), "eval_accuracy": ahead / count, "eval_margin": margin / count}


class DPOLoss(PreferenceLoss):
    """-log sigmoid(beta (log p(chosen) / ref(chosen) - log p(rejected) / ref(rejected)))."""

    def compare(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ours, _ = self.log_likelihoods(batch)
        chosen, rejected = (ours - self._reference(batch)).chunk(2)
        beta, smoothing = self.section.beta, self.section.label_smoothing
        margins = beta * (chosen - rejected)
        return -(1 - smoothing) * logsigmoid(margins) - smoothing * logsigmoid(-margins), margins.detach()

    @torch.no_grad()
    def _reference(self, batch: dict[str, Tensor]) -> Tensor:
        training = self.model.training
        model: Any = self.model.eval()
        with model.disable_adapter():
            found, _ = self.log_likelihoods(batch)
        self.model.train(training)
        return found


class ORPOLoss(PreferenceLoss):
    """Mean loss of the preferred answer's tokens - beta log sigmoid(log odds(chosen) - log odds(rejected)).

    Odds are those of an answer's likelihood a token. Each pair counts alike, however long its answers.
    """

    def compare(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        sums, counts = self.log_likelihoods(batch)
        mean = sums / counts.clamp(min=1)
        log_odds = mean - torch.log1p(-torch.exp(mean).clamp(max=1 - 1e-6))
        (chosen, _), (ahead, behind) = mean.chunk(2), log_odds.chunk(2)
        margins = ahead - behind
        return -chosen - self.section.beta * logsigmoid(margins), margins.detach()


def _together(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both halves as one batch [2B, T], so that the model runs once."""
    width = max(batch["input_ids"].shape[1], batch["second_input_ids"].shape[1])
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    together = {
        name: torch.cat(
            [pad(half, (0, width - half.shape[1]), value=value) for half in (batch[name], batch[f"second_{name}"])]
        )
        for name, value in fill.items()
    }
    return together | ({"task_ids": batch["task_ids"].repeat(2)} if "task_ids" in batch else {})
