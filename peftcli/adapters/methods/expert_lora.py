"""LoRA on fused experts: one A and B for each matrix of a parameter [experts, out, in]. Fields: `LoraConfig`.

The file holds them side by side, as PEFT does: A [experts * r, in] and B [out, r * experts], experts varying fastest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftcli.adapters.base import Tensors, TensorSpec
from peftcli.adapters.methods.lora import Lora
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class ExpertLora(Lora):
    """B_e A_e for every expert e."""

    kinds = frozenset({"parameter"})

    def tensors(self) -> dict[str, TensorSpec]:
        if self.config.init_lora_weights not in (True, False, "gaussian"):
            raise InputError(
                f"{self.config.init_lora_weights} does not start fused experts",
                field="init_lora_weights",
                allowed="true",
            )
        rows = self.r * self.shape.experts
        return {
            "lora_A.weight": TensorSpec((rows, self.shape.in_features), "kaiming"),
            "lora_B.weight": TensorSpec((self.shape.out_features, rows), "zeros"),
        }

    def delta(self, p: Tensors) -> Tensor:
        """dW [experts, out, in]."""
        experts = self.shape.experts
        a = p.lora_A.reshape(experts, self.r, -1)
        b = p.lora_B.reshape(-1, self.r, experts).permute(2, 0, 1)
        return torch.bmm(b, a) * self.scaling
