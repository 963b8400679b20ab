"""LoHa: dW = s (W1a W1b) * (W2a W2b), elementwise, s = alpha / r (Hyeon-Woo et al. 2021, FedPara, arXiv 2108.06098).

The product of two rank-r matrices has rank up to r^2. Of a convolution the paper's proposition 3 also factors the
kernel: each matrix becomes T x_1 Wa x_2 Wb with a core T [r, r, kernel].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Le

from peftcli.adapters.base import Adapter, DeltaAdapter, Tensors, TensorSpec, fill
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.methods.lora import Rank
from peftcli.adapters.old_patterns import follow_old_patterns, read_alike
from peftcli.adapters.targets import pattern_value
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Alpha = Annotated[float, Gt(0)] | Annotated[int, Gt(0)]
Probability = Annotated[float, Ge(0), Le(1)] | Annotated[int, Ge(0), Le(1)]


@dataclass
class LycorisConfig(TunerConfig):
    """Fields LoHa and LoKr share (the LyCORIS family).

    Attributes:
        r: rank.
        alpha: numerator of the scaling.
        rank_dropout: probability with which a row of dW is left out of a training pass.
        module_dropout: probability with which all of dW is.
        use_effective_conv2d: factor the kernel of convolutions too, where it is larger than 1.
        init_weights: True (no change at first) or False (random: for tests).
        rank_pattern, alpha_pattern: r or alpha by module name or regular expression, where they differ.
    """

    r: Rank = 8
    alpha: Alpha = 8
    rank_dropout: Probability = 0.0
    module_dropout: Probability = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True
    rank_pattern: dict[str, Rank] = field(default_factory=dict)
    alpha_pattern: dict[str, Alpha] = field(default_factory=dict)

    def follow_file(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        follow_old_patterns(self, shapes)


@dataclass
class LoHaConfig(LycorisConfig):
    """LoHa's fields, as in PEFT: see `LycorisConfig`."""

    peft_type = "LOHA"
    prefix = "hada_"


class LycorisAdapter(DeltaAdapter):
    """What LoHa and LoKr share: rank, scaling, dropout of rows and of all."""

    config: LycorisConfig
    rescales_rows: bool = True
    """Whether the rows left by rank_dropout are scaled up, so that their sum stays the same on average."""

    @cached_property
    def r(self) -> int:
        return pattern_value(self.config.rank_pattern, self.shape.name, self.config.r, field="rank_pattern")

    @cached_property
    def alpha(self) -> float:
        return pattern_value(self.config.alpha_pattern, self.shape.name, self.config.alpha, field="alpha_pattern")

    def initial_scaling(self) -> float:
        return self.alpha / self.r

    @classmethod
    def stored_config(cls, sites: list[tuple[Adapter, Tensors]], config: LycorisConfig) -> LycorisConfig:
        return read_alike(config.stored(), [adapter.shape.name for adapter, _ in sites])

    @property
    def factors_kernel(self) -> bool:
        return self.config.use_effective_conv2d and math.prod(self.shape.kernel) > 1

    @property
    def core_shape(self) -> tuple[int, ...]:
        """[r, r, kernel]; PEFT gives the core of a Conv1d a fourth dimension of 1."""
        kernel = self.shape.kernel
        return (self.r, self.r, *kernel, *[1] * (2 - len(kernel)))

    @property
    def drops(self) -> bool:
        return self.config.rank_dropout > 0 or self.config.module_dropout > 0

    def keep(self) -> Tensor | None:
        if not self.drops:
            return None
        rows = (torch.rand(self.shape.out_features) >= self.config.rank_dropout).float()
        if self.rescales_rows:
            rows /= rows.mean().clamp_min(1 / len(rows))  # a pass may drop all of them
        return rows * (torch.rand(1) >= self.config.module_dropout)


class LoHa(LycorisAdapter):
    """(W1a W1b) * (W2a W2b), scaled."""

    def tensors(self) -> dict[str, TensorSpec]:
        shape, r = self.shape, self.r
        out_features, in_features = shape.matrix
        a_shape, b_shape = (out_features, r), (r, in_features)
        if self.factors_kernel:
            a_shape, b_shape = (r, out_features), (r, shape.in_features // shape.groups)
        specs = {
            "hada_w1_a": TensorSpec(a_shape, "kaiming"),
            "hada_w1_b": TensorSpec(b_shape, "kaiming"),
            "hada_w2_a": TensorSpec(a_shape, "kaiming"),
            "hada_w2_b": TensorSpec(b_shape, "zeros"),
        }
        if self.factors_kernel:
            specs["hada_t1"] = specs["hada_t2"] = TensorSpec(self.core_shape, "kaiming")
        return specs

    def initialize(self, p: Tensors) -> Tensor | None:
        if not self.config.init_weights:
            fill(p.hada_w2_b, "kaiming")
        return None

    def delta(self, p: Tensors) -> Tensor:
        if self.factors_kernel:
            first = rebuild(p.hada_t1, p.hada_w1_a, p.hada_w1_b)
            second = rebuild(p.hada_t2, p.hada_w2_a, p.hada_w2_b)
        else:
            first, second = p.hada_w1_a @ p.hada_w1_b, p.hada_w2_a @ p.hada_w2_b
        return first * second * self.scaling


def rebuild(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The matrix [out, in * kernel] of a core [r, r, kernel] with its factors a [r, out] and b [r, in]."""
    return torch.einsum("ij...,io,jc->oc...", core, a, b).flatten(1)
