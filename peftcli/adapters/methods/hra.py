"""HRA: W reflected r times, y = W H_1 ... H_r x + b with H_i = I - 2 u_i u_i^T (Yuan et al. 2024, arXiv 2405.17484).

The product of reflections is I - U T U^T with an upper triangular T [r, r] (the compact WY form), where
T^-1 = I / 2 + the part of U^T U above the diagonal: two thin products instead of r steps.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from peftcli.adapters.base import Tensors, TensorSpec, TransformAdapter, fill
from peftcli.adapters.config import TunerConfig
from peftcli.lazy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class HRAConfig(TunerConfig):
    """HRA's fields, as in PEFT.

    Attributes:
        r: number of reflections; even, so that they can start in pairs that cancel.
        apply_GS: make the directions orthogonal (Gram-Schmidt). Reflections then can't cancel, so that the adapter
            starts away from the base.
        init_weights: start with pairs of equal reflections; False starts at random (for tests).
        bias: which biases are trained: `none`, those of adapted modules (`hra_only`), or `all`.
    """

    peft_type = "HRA"
    prefix = "hra_"

    r: Annotated[int, Ge(1), Le(1 << 16)] = 8
    apply_GS: bool = False
    init_weights: bool = True
    bias: Literal["none", "all", "hra_only"] = "none"


class Hra(TransformAdapter):
    """Reflections of the inputs."""

    kinds = frozenset({"linear", "conv", "attention"})
    config: HRAConfig

    def tensors(self) -> dict[str, TensorSpec]:
        return {"hra_u": TensorSpec((self.shape.matrix[1], self.config.r), "kaiming")}

    def initialize(self, p: Tensors) -> None:
        if not self.config.init_weights or self.config.apply_GS:  # equal directions have no orthogonal basis
            return
        if self.config.r % 2:
            warnings.warn("The symmetric initialization can NOT be performed when r is odd!", stacklevel=2)
            return
        half = p.hra_u.new_empty(p.hra_u.shape[0], self.config.r // 2)
        fill(half, "kaiming")
        p.hra_u.copy_(half.repeat_interleave(2, dim=1))

    def before(self, p: Tensors, x: Tensor) -> Tensor:
        u = p.hra_u.to(torch.promote_types(p.hra_u.dtype, torch.float32))
        u = torch.linalg.qr(u)[0] if self.config.apply_GS else functional.normalize(u, dim=0)
        inverse = torch.triu(u.mT @ u, diagonal=1) + torch.eye(u.shape[1], dtype=u.dtype, device=u.device) / 2
        ut = torch.linalg.solve_triangular(inverse, u, upper=True, left=False)
        return x - functional.linear(functional.linear(x, u.mT.to(x.dtype)), ut.to(x.dtype))
