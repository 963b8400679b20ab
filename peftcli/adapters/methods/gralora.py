"""GraLoRA: LoRA on each of k x k blocks of the weight, with rank r / k each (Jung et al. 2025, arXiv 2505.20355).

As many parameters as a LoRA of rank r, but dW has rank up to k r. A block's A belongs to its column of blocks and its B to
its row: block (i, j) takes the i-th part of the columns of A_j and the j-th part of the rows of B_i.
`hybrid_r` more ranks may be those of a LoRA on the whole weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from peftcli.adapters.base import DeltaAdapter, Tensors, TensorSpec, fill
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.methods.loha import Alpha, Probability
from peftcli.adapters.methods.lora import Rank
from peftcli.errors import InputError
from peftcli.lazy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import Site


@dataclass
class GraloraConfig(TunerConfig):
    """GraLoRA's fields, as in PEFT.

    Attributes:
        r: rank; must be a multiple of gralora_k.
        hybrid_r: rank of the LoRA beside it, 0 for none.
        alpha: numerator of the scaling alpha / (r + hybrid_r).
        gralora_dropout: dropout on the input of the adapter's path.
        gralora_k: blocks in each direction; must divide both sides of every adapted module.
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        bias: which biases are trained: `none`, those of adapted modules (`gralora_only`), or `all`.
        init_weights: True (no change at first) or False (random: for tests).
    """

    peft_type = "GRALORA"
    prefix = "gralora_"

    r: Rank = 32
    hybrid_r: Annotated[int, Ge(0)] = 0
    alpha: Alpha = 64
    gralora_dropout: Probability = 0.0
    gralora_k: Annotated[int, Ge(1)] = 2
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "gralora_only"] = "none"
    init_weights: bool = True

    def validate(self) -> None:
        super().validate()
        if self.r % self.gralora_k:
            raise InputError(f"r should be divisible by gralora_k, but got {self.r} and {self.gralora_k}", field="r")


class Gralora(DeltaAdapter):
    """k x k low-rank blocks."""

    config: GraloraConfig

    @property
    def dropout(self) -> float:
        return self.config.gralora_dropout

    def initial_scaling(self) -> float:
        return self.config.alpha / (self.config.r + self.config.hybrid_r)

    def tensors(self) -> dict[str, TensorSpec]:
        (out_features, in_features), r, k = self.shape.matrix, self.config.r, self.config.gralora_k
        for name, features in zip(("out_features", "in_features"), self.shape.matrix, strict=True):
            if features % k:
                raise InputError(
                    f"{name} should be divisible by gralora_k, but got {features} and {k}",
                    place=self.shape.name,
                    field="gralora_k",
                )
        specs = {
            "gralora_A": TensorSpec((k, in_features // k, r)),
            "gralora_B": TensorSpec((k, r, out_features // k), "zeros"),
        }
        if self.config.hybrid_r:
            specs["gralora_A_general.weight"] = TensorSpec((self.config.hybrid_r, in_features), "kaiming")
            specs["gralora_B_general.weight"] = TensorSpec((out_features, self.config.hybrid_r), "zeros")
        return specs

    def initialize(self, p: Tensors) -> Tensor | None:
        matrices = [*p.gralora_A.mT]  # each is filled as the [r, in / k] matrix it is the transpose of
        if not self.config.init_weights:
            matrices += [*p.gralora_B.mT]
            if self.config.hybrid_r:
                matrices.append(p.gralora_B_general)
        for matrix in matrices:
            fill(matrix, "kaiming")
        return None

    def delta(self, p: Tensors) -> Tensor:
        k = self.config.gralora_k
        a, b = p.gralora_A.unflatten(2, (k, -1)), p.gralora_B.unflatten(1, (k, -1))
        update = torch.einsum("jcir,ijro->iojc", a, b * self.scaling).reshape(self.shape.matrix)
        if self.config.hybrid_r:
            update = update + p.gralora_B_general @ p.gralora_A_general * self.scaling
        return update

    @property
    def builds_delta(self) -> bool:
        return self.shape.kind != "linear"

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        if self.builds_delta:
            return None
        p, k = p.to(x.dtype), self.config.gralora_k
        rows = x.flatten(0, -2).unflatten(1, (k, -1)).transpose(0, 1)  # [k, rows, in / k]
        hidden = torch.bmm(rows, p.gralora_A).unflatten(2, (k, -1))  # [from, rows, to, r / k]
        hidden = hidden.permute(2, 1, 0, 3).flatten(2)  # [to, rows, from * r / k]
        update = torch.bmm(hidden, p.gralora_B * self.scaling).transpose(0, 1).flatten(1)
        update = update.unflatten(0, x.shape[:-1])
        if self.config.hybrid_r:
            general = functional.linear(x, p.gralora_A_general)
            update = update + functional.linear(general, p.gralora_B_general * self.scaling)
        return update
