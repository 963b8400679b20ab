"""PVeRA: VeRA whose inner activations are drawn from a normal distribution the adapter gives them in training
(Fonlupt et al. 2025, arXiv 2512.07703).

z = mean + e^(log variance / 2) noise, where (mean, log variance) = diag(d) A x has twice the rank; y = W x + diag(b) B z.
Evaluated and merged, z is the mean.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from peftcli.adapters.base import Adapter, LowRankAdapter, Tensors, TensorSpec
from peftcli.adapters.config import PeftConfig, TunerConfig
from peftcli.adapters.methods.loha import Probability
from peftcli.adapters.methods.lora import Rank
from peftcli.adapters.methods.vera import Seed, check_projections
from peftcli.lazy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import Site


@dataclass
class PveraConfig(TunerConfig):
    """PVeRA's fields, as in PEFT.

    Attributes:
        r: rank.
        projection_prng_key: seed of A and B.
        save_projection: store A and B in the file; otherwise they are made again from the seed.
        pvera_dropout: dropout on the input of the adapter's path.
        d_initial: what d starts with; b starts at zero.
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        bias: which biases are trained: `none`, those of adapted modules (`pvera_only`), or `all`.
        init_weights: True (no change at first) or False (random: for tests).
        sample_at_inference: draw samples in evaluation, too.
        generator_seed: kept for PEFT. Samples follow the run's seed, with a warning where one is given: with a generator
            of their own, a layer that is recomputed in the backward pass would draw others than it did before.
    """

    peft_type = "PVERA"
    prefix = "pvera_lambda_"

    r: Rank = 256
    projection_prng_key: Seed = 0
    save_projection: bool = True
    pvera_dropout: Probability = 0.0
    d_initial: float | int = 0.1
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "pvera_only"] = "none"
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: Seed | None = None

    def check_beside(self, others: list[PeftConfig]) -> None:
        check_projections("PVeRA", self, [other for other in others if isinstance(other, PveraConfig)])


class Pvera(LowRankAdapter):
    """diag(b) B z."""

    kinds = frozenset({"linear"})
    config: PveraConfig

    @property
    def dropout(self) -> float:
        return self.config.pvera_dropout

    @property
    def drops(self) -> bool:
        return True

    def tensors(self) -> dict[str, TensorSpec]:
        (out_features, in_features), r = self.shape.matrix, self.config.r
        saved = self.config.save_projection
        return {
            "pvera_lambda_b": TensorSpec((out_features,), "zeros" if self.config.init_weights else "ones"),
            "pvera_lambda_d": TensorSpec((2 * r,), "normal"),
            "pvera_A": TensorSpec((2 * r, in_features), trainable=False, saved=saved, shared=True),
            "pvera_B": TensorSpec((out_features, r), trainable=False, saved=saved, shared=True),
        }

    def initialize(self, p: Tensors) -> Tensor | None:
        if self.config.init_weights:
            p.pvera_lambda_d.fill_(self.config.d_initial)
        return None

    @classmethod
    def make_shared(cls, adapters: list[Adapter], config: Any) -> dict[str, Tensor]:
        """A and B from the seed, on the CPU whatever the device: the same numbers as in PEFT."""
        out_features, in_features = (max(sizes) for sizes in zip(*(a.shape.matrix for a in adapters), strict=True))
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        a, b = torch.empty(2 * config.r, in_features), torch.empty(out_features, config.r)
        for tensor in (a, b):
            torch.nn.init.kaiming_uniform_(tensor, generator=generator)
        return {"pvera_A": a, "pvera_B": b}

    def _scaled(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """diag(d) A [2 r, in] and diag(b) B [out, r]."""
        out_features, in_features = self.shape.matrix
        a = p.pvera_A[:, :in_features] * p.pvera_lambda_d[:, None]
        return a, p.pvera_B[:out_features] * (self.scaling * p.pvera_lambda_b)[:, None]

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        a, b = self._scaled(p)
        return a[: self.config.r], b

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        if not (self.training or self.config.sample_at_inference):
            return super().activation(p, x, site)
        if self.config.generator_seed is not None:
            warnings.warn("PVERA: samples follow the run's seed, not `generator_seed`", stacklevel=2)
        a, b = (factor.to(x.dtype) for factor in self._scaled(p))
        mean, log_variance = functional.linear(x, a).chunk(2, -1)
        return functional.linear(mean + (log_variance / 2).exp() * torch.randn_like(mean), b)

    def merge_problem(self) -> str | None:
        if self.config.sample_at_inference:
            return "PVERA adapters cannot be merged with `sample_at_inference`: a weight draws no samples"
        return super().merge_problem()
