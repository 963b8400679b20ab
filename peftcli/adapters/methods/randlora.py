"""RandLoRA: dW = s sum_i B_i diag(l_i) A diag(g_i): random A, B_i shared by all modules, so many that dW has full rank;
only l_i and g_i are learnt (Albert et al. 2025, arXiv 2502.00987).

A [r, smaller side] comes with the trained scales, B_i [larger side, r] without: on a module with more inputs than outputs
the two change places. Both are made from a seed in bfloat16, as PEFT does, and kept once a model. PEFT's files repeat
them for every module; ours hold them once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from peftcli.adapters.base import Adapter, LowRankAdapter, Tensors, TensorSpec
from peftcli.adapters.config import PeftConfig, TunerConfig
from peftcli.adapters.methods.loha import Alpha, Probability
from peftcli.adapters.methods.lora import Rank
from peftcli.adapters.methods.vera import Seed, check_projections
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class RandLoraConfig(TunerConfig):
    """RandLoRA's fields, as in PEFT.

    Attributes:
        r: rank of each random pair; a smaller one means more pairs and more parameters.
        projection_prng_key: seed of A and B.
        save_projection: store A and B in the file; otherwise they are made again from the seed.
        sparse, very_sparse: A and B of -1, 0 and 1, zero with probability 2/3, or 1 - 1 / sqrt(smaller side).
        randlora_dropout: dropout on the input of the adapter's path.
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        randlora_alpha: numerator of the scaling alpha / r; about 20 r.
        bias: which biases are trained: `none`, those of adapted modules (`randlora_only`), or `all`.
        init_weights: True (no change at first) or False (random: for tests).
    """

    peft_type = "RANDLORA"
    prefix = "randlora_"

    r: Rank = 32
    projection_prng_key: Seed = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: Probability = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: Alpha = 640
    bias: Literal["none", "all", "randlora_only"] = "none"
    init_weights: bool = True

    def check_beside(self, others: list[PeftConfig]) -> None:
        check_projections("RandLora", self, [other for other in others if isinstance(other, RandLoraConfig)])


class RandLora(LowRankAdapter):
    """The sum over i of B_i diag(l_i) A diag(g_i), scaled, as one product of the A and B_i side by side."""

    obsolete = frozenset({"randlora_A", "randlora_B"})  # at each module, again
    config: RandLoraConfig

    @property
    def dropout(self) -> float:
        return self.config.randlora_dropout

    def initial_scaling(self) -> float:
        return self.config.randlora_alpha / self.config.r

    def tensors(self) -> dict[str, TensorSpec]:
        r, saved = self.config.r, self.config.save_projection
        larger, smaller = max(self.shape.matrix), min(self.shape.matrix)
        pairs = -(-smaller // r)
        return {
            "randlora_lambda": TensorSpec((r, pairs), "zeros" if self.config.init_weights else "normal"),
            "randlora_gamma": TensorSpec((pairs, smaller)),
            "randlora_A": TensorSpec((r, 1, smaller), trainable=False, saved=saved, shared=True),
            "randlora_B": TensorSpec((larger, pairs, r), trainable=False, saved=saved, shared=True),
        }

    def initialize(self, p: Tensors) -> Tensor | None:
        whole = p.randlora_gamma.shape if self.config.init_weights else self.shape.matrix
        p.randlora_gamma.fill_(1 / max(whole))
        return None

    @classmethod
    def make_shared(cls, adapters: list[Adapter], config: Any) -> dict[str, Tensor]:
        """A and the B_i from the seed, on the CPU whatever the device, with a standard deviation of 1."""
        sizes = [max(sizes) for sizes in zip(*(adapter.shape.matrix for adapter in adapters), strict=True)]
        larger, smaller = max(sizes), min(sizes)
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        pairs = -(-smaller // config.r)
        if config.sparse or config.very_sparse:
            zeros = math.sqrt(smaller) if config.very_sparse else 3
            a = _signs(torch.rand(config.r, 1, smaller, generator=generator), zeros)
            b = _signs(torch.rand(larger, pairs, config.r, generator=generator), zeros)
        else:
            a = _uniform((config.r, 1, smaller), generator)
            b = torch.cat([_uniform((larger, 1, config.r), generator) for _ in range(pairs)], 1)
        return {"randlora_A": (a / a.std()).float(), "randlora_B": (b / b.std()).float()}

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        out_features, in_features = self.shape.matrix
        pairs, smaller = p.randlora_gamma.shape
        scales = (p.randlora_lambda * self.scaling).unsqueeze(2)
        a = torch.utils.checkpoint.checkpoint(  # its product with one scale would be kept for the other's gradient
            lambda scales, gamma: scales * p.randlora_A[:, :, :smaller] * gamma,
            scales,
            p.randlora_gamma,
            use_reentrant=False,
        ).flatten(0, 1)
        b = p.randlora_B[: max(self.shape.matrix), :pairs].flatten(1)
        return (a, b) if in_features <= out_features else (b.T, a.T)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    return torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def _signs(uniform: Tensor, zeros: float) -> Tensor:
    """-1 and 1 with probability 1 / (2 zeros) each, else 0 (Li et al. 2006, "Very sparse random projections")."""
    edge = 1 / (2 * zeros)
    return (uniform > 1 - edge).float() - (uniform < edge).float()
