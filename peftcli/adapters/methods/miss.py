"""MiSS: dW repeats one shard: dW^T = [D; D; ...] with D [r, out] (Kang et al. 2024, arXiv 2409.15371).

So dW x = D^T (sum of x's blocks of r features): the cheapest of the methods here. Two variants:
`mini`: D itself repeats a shard [r, mini_r]; `bat` (block affine transformation): each block [r, r] of W, in the i-th
row of blocks, becomes W + W D_i + D_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from peftcli.adapters.base import DeltaAdapter, Init, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.methods.loha import Probability
from peftcli.adapters.methods.lora import Rank
from peftcli.errors import InputError
from peftcli.lazy import functional

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import Site


@dataclass
class MissConfig(TunerConfig):
    """MiSS's fields, as in PEFT.

    Attributes:
        r: features in a block.
        miss_dropout: dropout on the input of the adapter's path.
        mini_r: columns of the shard of `mini`; must divide the output features.
        bias: which biases are trained: `none`, those of adapted modules (`MiSS_only`), or `all`.
        init_weights: the variant: True, `bat` or `mini`, each without change at first; False: random, for tests.
    """

    peft_type = "MISS"
    prefix = "miss_"

    r: Rank = 64
    miss_dropout: Probability = 0.0
    mini_r: Annotated[int, Ge(1)] = 1
    bias: Literal["none", "all", "MiSS_only"] = "none"
    init_weights: bool | Literal["bat", "mini"] = True


class Miss(DeltaAdapter):
    """A shard repeated along the inputs."""

    kinds = frozenset({"linear", "conv", "attention", "parameter"})
    config: MissConfig

    @property
    def dropout(self) -> float:
        return self.config.miss_dropout

    @property
    def is_bat(self) -> bool:
        return self.config.init_weights == "bat"

    def tensors(self) -> dict[str, TensorSpec]:
        (out_features, in_features), r, mini_r = self.shape.matrix, self.config.r, self.config.mini_r
        if r > in_features:
            raise self._refusal(f"`r` ({r}) must be less than or equal to in_features ({in_features})", "r")
        if self.is_bat:
            if in_features % r or out_features % r:
                raise self._refusal("The weight matrix must be fully divisible into [r, r] blocks.", "r")
            return {"miss_block": TensorSpec((out_features // r, r, r), "zeros")}
        if self.config.init_weights == "mini":
            if out_features % mini_r:
                raise self._refusal(f"{mini_r} does not divide the {out_features} output features", "mini_r")
            return {"miss_block": TensorSpec((r, mini_r), "zeros")}
        init: Init = "zeros" if self.config.init_weights else "kaiming"
        return {"miss_block": TensorSpec((r, out_features), init)}

    def _refusal(self, problem: str, field: str) -> InputError:
        return InputError(problem, place=self.shape.name, field=field)

    def delta(self, p: Tensors) -> Tensor:
        (out_features, in_features), r = self.shape.matrix, self.config.r
        shard = p.miss_block * self.scaling
        if self.is_bat:
            blocks = self.weight().to(shard.dtype).unflatten(1, (-1, r)).unflatten(0, (-1, r))  # [out/r, r, in/r, r]
            update = blocks.transpose(1, 2) @ shard.unsqueeze(1) + shard.unsqueeze(1)
            return update.transpose(1, 2).flatten(2).flatten(0, 1)
        return shard.T.tile(out_features // shard.shape[1], -(-in_features // r))[:, :in_features]

    @property
    def builds_delta(self) -> bool:
        return self.is_bat or self.shape.kind != "linear"

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        if self.builds_delta:
            return None
        (out_features, in_features), r = self.shape.matrix, self.config.r
        shard = (p.miss_block * self.scaling).to(x.dtype)
        blocks = functional.pad(x, (0, -in_features % r)).unflatten(-1, (-1, r))
        return (blocks.sum(-2) @ shard).tile(out_features // shard.shape[1])
