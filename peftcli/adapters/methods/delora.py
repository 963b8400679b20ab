"""DeLoRA: dW = sum_i l / r (b_i a_i^T) / (|b_i| |a_i|) diag(n): rank-one terms of unit norm, so the trained strength l
bounds the change (Bini et al. 2025, arXiv 2503.18225). n [in] are the norms of W's columns at the start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

from peftcli.adapters.base import LowRankAdapter, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.methods.loha import Probability
from peftcli.adapters.methods.lora import Rank
from peftcli.adapters.targets import pattern_value

if TYPE_CHECKING:
    from torch import Tensor

Strength = Annotated[float, Gt(0)] | Annotated[int, Gt(0)]

SMALLEST_NORM = 1e-4  # B starts at zero


@dataclass
class DeloraConfig(TunerConfig):
    """DeLoRA's fields, as in PEFT.

    Attributes:
        r: rank.
        delora_lambda: what the strength l starts with.
        module_dropout: dropout on the input of the adapter's path (PEFT's name for it).
        bias: which biases are trained: `none`, those of adapted modules (`delora_only`), or `all`.
        init_weights: True (no change at first) or False (random: for tests).
        rank_pattern, lambda_pattern: r or delora_lambda by module name or regular expression, where they differ.
    """

    peft_type = "DELORA"
    prefix = "delora_"

    r: Rank = 8
    delora_lambda: Strength = 15
    module_dropout: Probability = 0.0
    bias: Literal["none", "all", "delora_only"] = "none"
    init_weights: bool = True
    rank_pattern: dict[str, Rank] = field(default_factory=dict)
    lambda_pattern: dict[str, Strength] = field(default_factory=dict)


class Delora(LowRankAdapter):
    """B A with rank-one terms of unit norm, times a strength."""

    config: DeloraConfig

    @cached_property
    def r(self) -> int:
        return pattern_value(self.config.rank_pattern, self.shape.name, self.config.r, field="rank_pattern")

    @property
    def dropout(self) -> float:
        return self.config.module_dropout

    def tensors(self) -> dict[str, TensorSpec]:
        (out_features, in_features), r = self.shape.matrix, self.r
        return {
            "delora_A": TensorSpec((r, in_features), "kaiming"),
            "delora_B": TensorSpec((out_features, r), "zeros" if self.config.init_weights else "kaiming"),
            "delora_lambda": TensorSpec((1,)),
            "delora_w_norm": TensorSpec((in_features,), trainable=False),
        }

    def initialize(self, p: Tensors) -> Tensor | None:
        pattern, default = self.config.lambda_pattern, self.config.delora_lambda
        p.delora_lambda.fill_(pattern_value(pattern, self.shape.name, default, field="lambda_pattern"))
        p.delora_w_norm.copy_(self.weight().to(p.delora_w_norm.dtype).norm(dim=0))
        return None

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        norms = p.delora_A.norm(dim=1).clamp_min(SMALLEST_NORM) * p.delora_B.norm(dim=0).clamp_min(SMALLEST_NORM)
        return p.delora_A * p.delora_w_norm, p.delora_B * (p.delora_lambda * (self.scaling / self.r) / norms)
