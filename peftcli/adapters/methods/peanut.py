"""PEANuT: dW^T = s f(W^T A^T) B^T: the update is a small network's answer to the weight (Zhong et al. 2024, arXiv
2410.01870).

f is an activation, then `depth` layers that encode and as many that decode, each with its activation and joined by skips.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from peftcli.adapters.base import LowRankAdapter, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.methods.lora import Rank
from peftcli.lazy import functional

if TYPE_CHECKING:
    from torch import Tensor

Gelu = Literal["gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "quick_gelu"]
Other = Literal["laplace", "leaky_relu", "linear", "mish", "relu", "relu2", "relu6", "sigmoid", "silu", "swish", "tanh"]


@dataclass
class PeanutConfig(TunerConfig):
    """PEANuT's fields, as in PEFT.

    Attributes:
        r: width of the network.
        depth: layers that encode, and that decode, between A and B.
        act_fn: the activation, by its name in transformers.
        scaling: factor on the update.
        init_weights: True (no change at first) or False (random: for tests).
    """

    peft_type = "PEANUT"
    prefix = "peanut_"

    r: Rank = 32
    depth: Annotated[int, Ge(0), Le(1024)] = 0
    act_fn: Gelu | Other = "relu"
    scaling: float | int = 1.0
    init_weights: bool = True


class Peanut(LowRankAdapter):
    """B f(A W), as a matrix of rank r."""

    config: PeanutConfig

    def initial_scaling(self) -> float:
        return self.config.scaling

    def tensors(self) -> dict[str, TensorSpec]:
        out_features, r = self.shape.matrix[0], self.config.r
        layers = [f"peanut_{kind}.{i}.weight" for kind in ("encoders", "decoders") for i in range(self.config.depth)]
        return {
            "peanut_A.weight": TensorSpec((r, out_features), "kaiming"),
            "peanut_B.weight": TensorSpec((out_features, r), "zeros" if self.config.init_weights else "kaiming"),
            **{layer: TensorSpec((r, r), "kaiming") for layer in layers},
        }

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        from transformers.activations import ACT2FN

        activate = ACT2FN[self.config.act_fn]
        hidden = activate(self.weight().to(p.dtype).T @ p.peanut_A.T)
        skips = []
        for i in range(self.config.depth):
            skips.append(hidden)
            hidden = activate(functional.linear(hidden, p[f"peanut_encoders.{i}.weight"]))
        for i in range(self.config.depth):
            hidden = activate(functional.linear(hidden, p[f"peanut_decoders.{i}.weight"])) + skips.pop()
        return hidden.T, p.peanut_B * self.scaling
