"""Super-Tuning: dW is zero but where the weight is largest; those entries are trained. Supra adds a LoRA beside
(arXiv 2607.09287).

The places are stored beside the values, as offsets into the weight row by row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Lt

from peftcli.adapters.base import DeltaAdapter, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig, later
from peftcli.adapters.methods.loha import Alpha
from peftcli.adapters.methods.lora import Rank
from peftcli.adapters.registry import Method
from peftcli.errors import InputError
from peftcli.lazy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import Site

Share = Annotated[float, Ge(0), Lt(1)] | Annotated[int, Ge(0), Lt(1)]


@dataclass
class SupertuningConfig(TunerConfig):
    """Super-Tuning's fields, as in PEFT, and the choice of layers that other methods have.

    Attributes:
        sparsity: share of the weight's entries that stay as they are.
        select_top: train the largest entries; False trains the smallest.
        r: rank of the LoRA beside; None is none.
        lora_alpha: numerator of its scaling; 2 r where it is None.
        lora_dropout: dropout on its input.
        init_weights: True (no change at first) or False (random: for tests).
        save_precomputed_indices: store the places; otherwise they are found again in the base's weight.
    """

    peft_type = "SUPERTUNING"
    prefix = "supertuning_"

    sparsity: Share = 0.99
    select_top: bool = True
    r: Rank | None = None
    lora_alpha: Alpha | None = None
    lora_dropout: Share = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True
    layers_to_transform: list[int] | int | None = later(None, since="0.21")
    layers_pattern: list[str] | str | None = later(None, since="0.21")

    def validate(self) -> None:
        super().validate()
        if self.r is None and self.lora_alpha is not None:
            raise InputError("lora_alpha is set but r is None: there is no LoRA to scale", field="lora_alpha")

    def adapter_variant(self) -> Method | None:
        return Method("supertuning", "SupertuningConfig", "Supra") if self.r else None


class Supertuning(DeltaAdapter):
    """Values at the places of the largest weights."""

    kinds = frozenset({"linear", "conv", "attention"})
    config: SupertuningConfig

    def tensors(self) -> dict[str, TensorSpec]:
        room = math.prod(self.shape.matrix)
        count = int(room * (1 - self.config.sparsity))
        if count < 1:
            raise InputError(
                f"sparsity={self.config.sparsity} leaves no trainable entries for a weight with {room} elements",
                place=self.shape.name,
                field="sparsity",
            )
        saved = self.config.save_precomputed_indices
        return {
            "supertuning_values": TensorSpec((count,), "zeros" if self.config.init_weights else "normal"),
            "supertuning_indices": TensorSpec((count,), trainable=False, saved=saved, dtype="int32"),
        }

    def initialize(self, p: Tensors) -> Tensor | None:
        self._find(p)
        return None

    def regenerate(self, p: Tensors) -> Tensor | None:
        if not self.config.save_precomputed_indices:
            self._find(p)
        return None

    def _find(self, p: Tensors) -> None:
        size = self.weight().abs().flatten()
        p.supertuning_indices.copy_(size.topk(len(p.supertuning_values), largest=self.config.select_top).indices)

    def restored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        places = tensors.get("supertuning_indices")
        if places is not None and (places.min() < 0 or places.max() >= math.prod(self.shape.matrix)):
            raise InputError("holds places outside of the weight", place=self.shape.name, field="supertuning_indices")
        return tensors

    def merged_weight(self, p: Tensors, weight: Tensor) -> Tensor:
        values = (p.supertuning_values * self.scaling).to(weight.dtype)
        return weight.flatten().index_add(0, p.supertuning_indices, values).reshape(weight.shape)

    def delta(self, p: Tensors) -> Tensor:
        return Supertuning.merged_weight(self, p, p.supertuning_values.new_zeros(self.shape.matrix))


class Supra(Supertuning):
    """Super-Tuning and a LoRA."""

    kinds = frozenset({"linear"})

    def tensors(self) -> dict[str, TensorSpec]:
        out_features, in_features = self.shape.matrix
        r = self.config.r or 1
        return {
            **super().tensors(),
            "supertuning_lora_A.weight": TensorSpec((r, in_features), "kaiming"),
            "supertuning_lora_B.weight": TensorSpec(
                (out_features, r), "zeros" if self.config.init_weights else "kaiming"
            ),
        }

    def _factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        alpha_over_r = (self.config.lora_alpha or 2 * (self.config.r or 1)) / (self.config.r or 1)
        return p.supertuning_lora_A, p.supertuning_lora_B * (alpha_over_r * self.scaling)

    def delta(self, p: Tensors) -> Tensor:
        a, b = self._factors(p)
        return super().delta(p) + b @ a

    def merged_weight(self, p: Tensors, weight: Tensor) -> Tensor:
        a, b = self._factors(p)
        return super().merged_weight(p, weight) + (b @ a).to(weight.dtype)

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        def sparse(x: Tensor, values: Tensor) -> Tensor:
            return functional.linear(x, Supertuning.delta(self, p).to(x.dtype))

        kept = functional.dropout(x, self.config.lora_dropout, self.training)
        built = torch.utils.checkpoint.checkpoint(sparse, x, p.supertuning_values, use_reentrant=False)
        return built + site.low_rank(kept, *self._factors(p))
