"""RoAd: pairs of outputs turned and scaled, y' = a cos(t) * y + a sin(t) * turned(y) (Liao et al. 2024, arXiv 2409.00119).

Outputs are cut into groups; element i of a group's first half is paired with element i of its second half, and
turned(y) is (-second, first). Elementwise only, so rows of many adapters mix in a batch at no cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from peftcli.adapters.base import Tensors, TensorSpec, TransformAdapter
from peftcli.adapters.config import TunerConfig
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

SHARING = {"road_1": (1, 1), "road_2": (1, 2), "road_4": (2, 2)}
"""(Parameters for cos and sin apart, parameters for the halves apart) of each variant; 1 means they share."""


@dataclass
class RoadConfig(TunerConfig):
    """RoAd's fields, as in PEFT.

    Attributes:
        variant: parameters for each pair: one angle and scale (`road_1`), one for each output (`road_2`), or separate
            ones for cos and sin too (`road_4`).
        group_size: outputs in a group; even, and a divisor of their number.
        init_weights: start with the identity; False starts at random (for tests).
    """

    peft_type = "ROAD"
    prefix = "road_"
    absent = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: Annotated[int, Ge(2), Le(1 << 20)] = 64
    init_weights: bool = True

    def validate(self) -> None:
        super().validate()
        if self.group_size % 2:
            raise InputError(f"The group_size must be divisible by 2, but got {self.group_size}.", field="group_size")


class Road(TransformAdapter):
    """Angles and scales on the outputs."""

    kinds = frozenset({"linear", "conv", "attention"})
    config: RoadConfig

    def tensors(self) -> dict[str, TensorSpec]:
        outputs, group = self.shape.out_features, self.config.group_size
        if outputs % group:
            raise InputError(
                f"{outputs} outputs do not divide into groups of {group}", place=self.shape.name, field="group_size"
            )
        columns, halves = SHARING[self.config.variant]
        size = (outputs // 2 * columns * halves,)
        return {"road_theta": TensorSpec(size, "zeros"), "road_alpha": TensorSpec(size, "ones")}

    def initialize(self, p: Tensors) -> None:
        if not self.config.init_weights:
            p.road_theta.normal_(std=0.5)
            p.road_alpha.normal_(mean=1.0, std=0.5)

    def after(self, p: Tensors, y: Tensor) -> Tensor:
        half = self.config.group_size // 2
        theta, alpha = (t.reshape(-1, *SHARING[self.config.variant], half) for t in (p.road_theta, p.road_alpha))
        own, other = (alpha * theta.cos())[:, 0], (alpha * theta.sin())[:, -1]  # [groups, 1 or 2, half]
        pairs = y.unflatten(-1, (-1, 2, half))
        turned = torch.cat([-pairs[..., 1:, :], pairs[..., :1, :]], dim=-2)
        return (pairs * own + turned * other).flatten(-3)
