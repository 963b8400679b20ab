"""OFT as PEFT 0.13 had it: y = R^T W x + b, a block-diagonal rotation of the outputs (see oft.py).

Each block is Cayley's transform of the antisymmetric part of a full matrix.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from peftcli.adapters.base import Tensors, TensorSpec, TransformAdapter
from peftcli.adapters.methods.oft import OFTConfig
from peftcli.adapters.rotations import cayley, rotate_blocks, within_ball
from peftcli.adapters.targets import pattern_value
from peftcli.lazy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor


class OutputOft(TransformAdapter):
    """Blocks that turn the outputs without the bias; the last one is cut where they do not fit."""

    kinds = frozenset({"linear", "conv", "attention"})
    transforms_bias = False
    config: OFTConfig

    @cached_property
    def r(self) -> int:
        return pattern_value(self.config.rank_pattern, self.shape.name, self.config.r or 1, field="rank_pattern")

    def tensors(self) -> dict[str, TensorSpec]:
        size = -(-self.shape.out_features // self.r)
        blocks = 1 if self.config.block_share else self.r
        return {"oft_r": TensorSpec((blocks, size, size), "zeros" if self.config.init_weights else "kaiming")}

    def dropped(self, p: Tensors) -> Tensors:
        if not self.config.module_dropout:
            return p
        kept = torch.rand((), device=p.oft_r.device) >= self.config.module_dropout
        return Tensors(oft_r=p.oft_r * kept)

    def after(self, p: Tensors, y: Tensor) -> Tensor:
        blocks, size = p.oft_r, p.oft_r.shape[-1]
        if self.config.coft:
            blocks = within_ball(blocks, self.config.eps * size**2)
        padded = functional.pad(y, (0, self.r * size - y.shape[-1]))
        return rotate_blocks(padded, cayley((blocks - blocks.mT) / 2))[..., : y.shape[-1]]
