"""C3A: dW consists of circulant blocks [b, b], each given by one kernel of b numbers, over in (Chen et al. 2024,
arXiv 2407.19342, "Parameter-Efficient Fine-Tuning via Circular Convolution").

A block's row k is its kernel moved k places to the right, so its product with x is a circular correlation. Building dW
by moving numbers and adding it to W costs less than transforming the activations there and back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from peftcli.adapters.base import DeltaAdapter, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.targets import pattern_value
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Size = Annotated[int, Ge(1)]


@dataclass
class C3AConfig(TunerConfig):
    """C3A's fields, as in PEFT.

    Attributes:
        block_size: b; must divide both sides of every adapted module. Smaller blocks mean more parameters.
        bias: which biases are trained: `none`, those of adapted modules (`c3a_only`), or `all`.
        block_size_pattern: block_size by module name or regular expression, where it differs.
        init_weights: True (zero: no change at first), `gaussian`, `kaiming_uniform`, or `xavier_uniform` (also False).
    """

    peft_type = "C3A"
    prefix = "c3a_"

    block_size: Size = 256
    bias: Literal["none", "all", "c3a_only"] = "none"
    block_size_pattern: dict[str, Size] = field(default_factory=dict)
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] | None = "xavier_uniform"


class C3A(DeltaAdapter):
    """Circulant blocks."""

    config: C3AConfig

    @cached_property
    def block_size(self) -> int:
        pattern, default = self.config.block_size_pattern, self.config.block_size
        return pattern_value(pattern, self.shape.name, default, field="block_size_pattern")

    def initial_scaling(self) -> float:
        return 1 / self.shape.matrix[1]

    def tensors(self) -> dict[str, TensorSpec]:
        size = self.block_size
        for name, features in zip(("output", "input"), self.shape.matrix, strict=True):
            if features % size:
                raise InputError(
                    f"The block size should be a factor of the {name} size. However, the {name} size is {features} and "
                    f"the block size is {size}",
                    place=self.shape.name,
                    field="block_size",
                )
        out_features, in_features = self.shape.matrix
        return {"c3a_kernel": TensorSpec((out_features // size, in_features // size, size), "zeros")}

    def initialize(self, p: Tensors) -> Tensor | None:
        out_features, in_features = self.shape.matrix
        how = self.config.init_weights
        if how == "gaussian":
            p.c3a_kernel.normal_()
        elif how is not True and how is not None:
            bound = math.sqrt(1 / in_features if how == "kaiming_uniform" else 6 / (out_features + in_features))
            p.c3a_kernel.uniform_(-bound, bound)
        return None

    def delta(self, p: Tensors) -> Tensor:
        places = torch.arange(self.block_size, device=p.c3a_kernel.device)
        moved = (places - places.unsqueeze(1)) % self.block_size
        blocks = p.c3a_kernel[:, :, moved] * self.scaling  # [out / b, in / b, b, b]
        return blocks.transpose(1, 2).reshape(self.shape.matrix)
