"""Prefix tuning: learnt keys and values in front of every layer's own (Li and Liang 2021, arXiv 2101.00190).

The prompt [tokens, layers * 2 * dim] is an embedding's rows, or W2 tanh(W1 e) of small ones while it is trained; the
file holds the rows in either case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from peftcli.adapters.config import later
from peftcli.adapters.prompt_base import PromptLearningConfig, PromptMethod, Size
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning's fields, as in PEFT.

    Attributes:
        encoder_hidden_size: hidden size of the projection; `token_dim` if None.
        prefix_projection: make the prefix by a small network while it is trained.
        init_weights: `zero` starts with keys and values of zero; None at random.
    """

    peft_type = "PREFIX_TUNING"
    allows_checkpointing = False

    encoder_hidden_size: Size | None = None
    prefix_projection: bool = False
    init_weights: Literal["zero"] | None = later(None, since="0.14")

    def complete(self, base_config: Any) -> None:
        super().complete(base_config)
        text = base_config.get_text_config() if hasattr(base_config, "get_text_config") else base_config
        key_heads = getattr(text, "num_key_value_heads", None)
        if key_heads:  # grouped-query attention keeps fewer keys than queries
            assert self.token_dim and self.num_attention_heads
            head_dim = getattr(text, "head_dim", None) or self.token_dim // self.num_attention_heads
            self.token_dim, self.num_attention_heads = head_dim * key_heads, key_heads
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim


class PrefixTuning(PromptMethod):
    """Keys and values in front of each layer's own."""

    feeds = "cache"
    config: PrefixTuningConfig

    @property
    def tokens(self) -> int:
        assert self.config.num_virtual_tokens
        return self.config.num_virtual_tokens

    @property
    def width(self) -> int:
        assert self.config.num_layers and self.config.token_dim
        return self.config.num_layers * 2 * self.config.token_dim

    @property
    def is_plain(self) -> bool:
        return self.config.inference_mode or not self.config.prefix_projection

    def parts(self) -> dict[str, nn.Module | nn.Parameter | Tensor]:
        if self.is_plain:
            return super().parts()
        nn, dim, hidden = torch.nn, self.config.token_dim, self.config.encoder_hidden_size
        assert dim and hidden
        return {
            "embedding": nn.Embedding(self.tokens, dim),
            "transform": nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, self.width)),
        }

    def initialize(self, p: Any, words: nn.Embedding) -> None:
        if self.config.init_weights == "zero":
            for parameter in (p.embedding if self.is_plain else p.transform[-1]).parameters():
                parameter.zero_()

    def prompt(self, p: Any, task_ids: Tensor | None = None) -> Tensor:
        return p.embedding.weight if self.is_plain else p.transform(p.embedding.weight)

    def key_values(self, prompt: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer.

        An encoder-decoder's rows are laid out in PEFT for self and cross attention, [k, v, cross k, cross v] a layer,
        the 2 * layers there are used twice over; the cross part is then dropped. So layer i has entry 4 i and 4 i + 1.
        """
        heads, layers = self.config.num_attention_heads, self.config.num_layers
        submodules = self.config.num_transformer_submodules
        assert heads and layers and submodules
        entries = prompt.view(self.tokens, 2 * layers, heads, -1).permute(1, 2, 0, 3)
        starts = [2 * submodules * layer % (2 * layers) for layer in range(layers)]
        return [(entries[start], entries[start + 1]) for start in starts]
