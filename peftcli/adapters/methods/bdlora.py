"""BD-LoRA: dW = s B A where A or B is block-diagonal, so that each device of a sharded model needs only its own block
(Wang et al. 2025, arXiv 2510.23346).

The file holds the blocks below each other: A [r, in / blocks], B [out, r / blocks].
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from peftcli.adapters.base import Tensors, TensorSpec
from peftcli.adapters.methods.lora import Lora
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class BdLora(Lora):
    """B A with blocks."""

    kinds = frozenset({"linear"})

    @property
    def settings(self) -> Any:
        """BdLoraConfig."""
        return self.config.use_bdlora

    @classmethod
    def arrange(cls, adapters: list[Any]) -> None:
        for adapter in adapters:
            if adapter.settings.match_strict and not adapter.blocked:
                raise InputError(
                    "matches neither target_modules_bd_a nor target_modules_bd_b",
                    place=adapter.shape.name,
                    field="use_bdlora",
                    fix="match_strict: false gives such modules plain LoRA",
                )

    @cached_property
    def blocked(self) -> str | None:
        """The factor that is block-diagonal, by its key; None at a module that has plain LoRA."""
        named = {"lora_A.weight": self.settings.target_modules_bd_a, "lora_B.weight": self.settings.target_modules_bd_b}
        keys = [key for key, parts in named.items() if any(part in self.shape.name for part in parts or [])]
        if len(keys) == 2:
            raise InputError("A and B can't both be block-diagonal", place=self.shape.name, field="use_bdlora")
        return keys[0] if keys else None

    def tensors(self) -> dict[str, TensorSpec]:
        specs, blocks = super().tensors(), self.settings.nblocks
        if self.blocked:
            rows, columns = specs[self.blocked].shape
            if rows % blocks or columns % blocks:
                raise InputError(
                    f"{self.blocked} [{rows}, {columns}] is not divisible into {blocks} blocks",
                    place=self.shape.name,
                    field="use_bdlora.nblocks",
                )
            specs[self.blocked] = TensorSpec((rows, columns // blocks), specs[self.blocked].init)
        return specs

    def initialize(self, p: Tensors) -> Tensor | None:
        changed = super().initialize(p)
        if self.blocked == "lora_A.weight" and isinstance(self.config.init_lora_weights, bool):
            torch.nn.init.kaiming_uniform_(p.lora_A)  # without LoRA's factor of 1 / sqrt(6), as in PEFT
        return changed

    def pair(self, p: Tensors) -> tuple[Tensor, Tensor]:
        a, b = (
            torch.block_diag(*p[key].chunk(self.settings.nblocks)) if key == self.blocked else p[key]
            for key in ("lora_A.weight", "lora_B.weight")
        )
        return a, b
