"""BEFT: y = W x + b + c, a bias c and nothing else (Huang et al. 2025, arXiv 2509.15974)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftcli.adapters.base import Tensors, TensorSpec, TransformAdapter
from peftcli.adapters.config import TunerConfig, later

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class BeftConfig(TunerConfig):
    """BEFT's fields, as in PEFT, and the choice of layers that other methods have.

    Attributes:
        init_weights: True (no change at first) or False (random: for tests).
    """

    peft_type = "BEFT"
    prefix = "beft_"

    init_weights: bool = True
    layers_to_transform: list[int] | int | None = later(None, since="0.21")
    layers_pattern: list[str] | str | None = later(None, since="0.21")


class Beft(TransformAdapter):
    """A bias added to the outputs."""

    kinds = frozenset({"linear"})
    config: BeftConfig

    def tensors(self) -> dict[str, TensorSpec]:
        shape = (1, self.shape.out_features)
        return {"beft_bias": TensorSpec(shape, "zeros" if self.config.init_weights else "normal")}

    def after(self, p: Tensors, y: Tensor) -> Tensor:
        return y + p.beft_bias.flatten() * self.scaling

    def merge_problem(self) -> str | None:
        return None if self.shape.has_bias else "Base layer has no bias, cannot merge a bias adapter"

    def merged_weight(self, p: Tensors, weight: Tensor) -> Tensor:
        return weight
