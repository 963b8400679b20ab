"""PEFT's prompt encoders as modules of their own, made of a config: what `prompt_encoder[name]` holds in a model."""

from __future__ import annotations

from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters import prompt
from peftcli.adapters.prompt_base import PromptLearningConfig
from peftcli.adapters.registry import prompt_class


class _FromConfig(prompt.PromptEncoder):
    """A prompt without a model.

    Args:
        config: with everything that a model would tell (`token_dim`, `num_layers`, ...).
        word_embeddings: the base's, for prompts that begin as text.
    """

    def __init__(self, config: PromptLearningConfig, word_embeddings: nn.Embedding | None = None) -> None:
        super().__init__(prompt_class(config)(config), torch.device("cpu"))
        if word_embeddings is not None:
            with torch.no_grad():
                self.method.initialize(self, word_embeddings)

    def forward(self, indices: Tensor, task_ids: Any = None) -> Tensor:  # type: ignore[override]  # PEFT's are called so
        """The prompt's rows [B, n, width] at indices [B, n]."""
        rows = super().forward(task_ids)
        return rows[indices] if rows.dim() == 2 else rows


class PromptEmbedding(_FromConfig):
    """Of prompt tuning."""


class PromptEncoder(_FromConfig):
    """Of P-tuning."""


class PrefixEncoder(_FromConfig):
    """Of prefix tuning."""


class CPTEmbedding(_FromConfig):
    """Of context-aware prompt tuning."""


class CartridgeEncoder(_FromConfig):
    """Of cartridges."""
