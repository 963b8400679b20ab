"""What every objective is: a module that sums the loss of a batch, and knows what its sums mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "task_ids")
"""What models take of a batch."""


class Objective(nn.Module):
    """A model that returns its loss, so that DDP and FSDP wrap it whole.

    Args:
        model: adapted or not.
        bf16: run under bfloat16 autocast.
    """

    def __init__(self, model: nn.Module, *, bf16: bool = False) -> None:
        super().__init__()
        self.model, self.bf16 = model, bf16

    def forward(self, batch: dict[str, Tensor], score: bool = False) -> Tensor:
        """The loss sum () of a batch, as `to_batch` makes it: over tokens, or over samples where these are judged whole.

        With `score` instead sums [K] float64 from which `metrics` follows, those of several batches added up.
        """
        raise NotImplementedError

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """`eval_loss` and what else the sums of a whole data set tell."""
        return {"eval_loss": sums[0] / sums[1]}

    def release(self) -> None:
        """Put back what was changed in the model for speed."""

    def autocast(self, device: torch.device) -> Any:
        return torch.autocast(device.type, torch.bfloat16) if self.bf16 else nullcontext()


def token_metrics(loss_sum: float, correct: float, count: float) -> dict[str, float]:
    """Of a language model, decoder or encoder-decoder."""
    mean = loss_sum / count
    return {
        "eval_loss": mean,
        "eval_perplexity": math.exp(min(mean, 700.0)),  # e^710 is infinite, which JSON can't hold
        "eval_token_accuracy": correct / count,
    }


def inputs_of(batch: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The model's inputs among a batch's tensors, of the second sequence with `prefix="second_"`."""
    return {name: batch[prefix + name] for name in INPUTS if prefix + name in batch}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows [N, C], [N] in float32 at least; rows labelled -100 count nothing."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(wide, labels, reduction="sum")


def summed(*values: Tensor | float) -> Tensor:
    """Numbers and vectors in a row, float64."""
    parts = [torch.as_tensor(value, dtype=torch.float64).reshape(-1).cpu() for value in values]
    return torch.cat(parts)
