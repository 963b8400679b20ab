"""Lily: low-rank updates whose parts the layers of a model share (Zhong et al. 2024, arXiv 2407.09946).

h = A x, dW x = s sum_k w_k B_k h. Several layers have one A, all layers have the same B_k; each has a router whose
softmax, averaged over all tokens of the batch, gives the weights w. What a text gets depends on the texts beside it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le

from peftcli.adapters.base import DeltaAdapter, Init, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.methods.lora import Rank
from peftcli.errors import InputError
from peftcli.lazy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import Site


@dataclass
class LilyConfig(TunerConfig):
    """Lily's fields, as in PEFT.

    Attributes:
        r: rank.
        stride_A: how many layers, one after the other, have the same A.
        num_B: how many B there are.
        scaling: factor on the update.
        init_weights: True (no change at first) or False (random: for tests).
    """

    peft_type = "LILY"
    prefix = "lily_"

    r: Rank = 32
    stride_A: Annotated[int, Ge(1)] = 1
    num_B: Annotated[int, Ge(2), Le(1 << 20)] = 2
    scaling: float | int = 1.0
    init_weights: bool = True


class Lily(DeltaAdapter):
    """A mixture of the B_k after A."""

    kinds = frozenset({"linear"})
    mergeable = False
    rows_interact = True
    config: LilyConfig
    owner_of_a: str | None = None
    """The module whose A this one has; None has its own."""
    owner_of_b: str | None = None

    @classmethod
    def arrange(cls, adapters: list[Any]) -> None:
        """Modules of one kind (what `target_modules` calls them) and one shape share."""
        alike: dict[object, list[Any]] = defaultdict(list)
        for adapter in adapters:
            targets = adapter.config.target_modules
            own = adapter.shape.name.rpartition(".")[2] if adapter.config.is_all_linear else ""
            names = [own] if isinstance(targets, str) else [t for t in targets if adapter.shape.name.endswith(t)]
            alike[max(names, key=len, default=""), adapter.shape.matrix].append(adapter)
        for group in alike.values():
            for index, adapter in enumerate(group):
                first = group[index - index % adapter.config.stride_A]
                adapter.owner_of_a = first.shape.name if first is not adapter else None
                adapter.owner_of_b = group[0].shape.name if index else None

    def initial_scaling(self) -> float:
        return self.config.scaling

    def tensors(self) -> dict[str, TensorSpec]:
        (out_features, in_features), r, count = self.shape.matrix, self.config.r, self.config.num_B
        start: Init = "zeros" if self.config.init_weights else "kaiming"
        return {
            "lily_A.weight": TensorSpec((r, in_features), "kaiming", owner=self.owner_of_a),
            "lily_B.weight": TensorSpec((count * r, out_features), start, owner=self.owner_of_b),
            "lily_router.weight": TensorSpec((count, r), "kaiming"),
        }

    def delta(self, p: Tensors) -> Tensor:
        raise InputError("the update of a LILY adapter depends on the batch: there is no single one")

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        hidden = functional.linear(x, p.lily_A.to(x.dtype))
        scores = functional.linear(hidden, p.lily_router.to(x.dtype))
        weights = scores.softmax(-1).flatten(0, -2).mean(0)
        mixed = torch.einsum("k,kro->ro", weights, p.lily_B.to(x.dtype).unflatten(0, (self.config.num_B, -1)))
        return hidden @ mixed * self.scaling
