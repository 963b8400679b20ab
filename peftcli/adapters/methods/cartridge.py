"""Cartridge: a trained key-value cache, whose first tokens stay fixed (Eyuboglu et al. 2025, arXiv 2506.06266).

The same function as prefix tuning without a projection; the fixed tokens keep attention's sink in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from peftcli.adapters.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


@dataclass
class CartridgeConfig(PrefixTuningConfig):
    """Cartridge's fields, as in PEFT.

    Attributes:
        num_frozen_tokens: how many tokens at the front are not trained.
    """

    peft_type = "CARTRIDGE"
    absent = frozenset({"encoder_hidden_size", "prefix_projection", "init_weights"})

    num_frozen_tokens: Annotated[int, Ge(0)] = 1

    def complete(self, base_config: Any) -> None:
        super().complete(base_config)
        self.encoder_hidden_size = None

    def validate(self) -> None:
        super().validate()
        if self.num_frozen_tokens > (self.num_virtual_tokens or 0):
            raise InputError(
                f"is {self.num_frozen_tokens} of {self.num_virtual_tokens} tokens", field="num_frozen_tokens"
            )


class Cartridge(PrefixTuning):
    """A trained cache with a fixed front."""

    config: CartridgeConfig

    def parts(self) -> dict[str, nn.Module | nn.Parameter | Tensor]:
        fixed = self.config.num_frozen_tokens
        return {
            "frozen_embedding": torch.randn(fixed, self.width),
            "trainable_embedding": torch.nn.Parameter(torch.randn(self.tokens - fixed, self.width)),
        }

    def prompt(self, p: Any, task_ids: Tensor | None = None) -> Tensor:
        return torch.cat([p.frozen_embedding, p.trainable_embedding])

    def live(self, p: Any) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.prompt(p)}

    def accept(self, p: Any, tensors: Mapping[str, Tensor]) -> None:
        fixed = self.config.num_frozen_tokens
        p.frozen_embedding.copy_(tensors["prompt_embeddings"][:fixed])
        p.trainable_embedding.copy_(tensors["prompt_embeddings"][fixed:])
