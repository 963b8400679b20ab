"""BOFT: W turned by a butterfly of block-diagonal rotations, outputs scaled (Liu et al. 2023, arXiv 2311.06243).

y = s * (W R^T x) + b with R^T x computed as m factors, each a permutation, a block-diagonal rotation and the permutation
back. Factor i lets features mix that lie 2^i half blocks apart, so few parameters make a dense rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from peftcli.adapters.base import Tensors, TensorSpec, TransformAdapter
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.rotations import cayley, chosen_blocks, rotate_blocks
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Count = Annotated[int, Ge(0), Le(1 << 20)]


@dataclass
class BOFTConfig(TunerConfig):
    """BOFT's fields, as in PEFT.

    Attributes:
        boft_block_size: size of a block.
        boft_block_num: number of blocks of a factor; one of the two must be 0, since their product is the input size.
        boft_n_butterfly_factor: number of factors; 1 is OFT with scaled outputs.
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        boft_dropout: share of the blocks of one factor, drawn anew, that turn nothing in a training pass.
        bias: which biases are trained: `none`, those of adapted modules (`boft_only`), or `all`.
        init_weights: start with the identity; False starts at random (for tests).
    """

    peft_type = "BOFT"
    prefix = "boft_"

    boft_block_size: Count = 4
    boft_block_num: Count = 0
    boft_n_butterfly_factor: Annotated[int, Ge(1), Le(30)] = 1
    fan_in_fan_out: bool = False
    boft_dropout: Annotated[float, Ge(0), Le(1)] = 0.0
    bias: Literal["none", "all", "boft_only"] = "none"
    init_weights: bool = True

    def follow_file(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """PEFT without its CUDA kernel makes one factor, whatever the config it writes asks for."""
        factors = {shape[0] for key, shape in shapes.items() if key.endswith(".boft_R") and len(shape) == 4}
        if factors == {1}:
            self.boft_n_butterfly_factor = 1

    def validate(self) -> None:
        super().validate()
        size, number = self.boft_block_size, self.boft_block_num
        if not size and not number:
            raise InputError("Either `boft_block_size` or `boft_block_num` must be non-zero.", field="boft_block_size")
        if size and number:
            raise InputError(
                f"You can only specify either boft_block_size ({size}) or boft_block_num ({number}), but not both",
                field="boft_block_num",
                fix="their product is the number of inputs; set one of them to 0",
            )


class Boft(TransformAdapter):
    """Factors on the inputs, a scale on the outputs without the bias."""

    kinds = frozenset({"linear", "conv", "attention"})
    obsolete = frozenset({"boft_P"})  # the permutations, which follow from the sizes
    transforms_bias = False
    config: BOFTConfig

    @cached_property
    def blocks(self) -> tuple[int, int]:
        """(number, size) of a factor's blocks.

        Raises:
            InputError: if they do not fit the module.
        """
        features = self.shape.matrix[1]
        name = "boft_block_size" if self.config.boft_block_size else "boft_block_num"
        given = getattr(self.config, name)
        if features % given:
            raise InputError(f"{features} inputs do not divide by {name} {given}", place=self.shape.name, field=name)
        number, size = features // given, given
        if name == "boft_block_num":
            number, size = size, number
        span = 2 ** (self.config.boft_n_butterfly_factor - 1)
        if number % span or (span > 1 and size % 2):
            raise InputError(
                f"{self.config.boft_n_butterfly_factor} factors do not fit {number} blocks of size {size}",
                place=self.shape.name,
                field="boft_n_butterfly_factor",
                allowed=f"an even block size, and a number of blocks that divides by 2^(factors - 1) = {span}",
            )
        return number, size

    def tensors(self) -> dict[str, TensorSpec]:
        number, size = self.blocks
        scale = (1, self.shape.out_features) if self.shape.kind == "conv" else (self.shape.out_features, 1)
        return {
            "boft_R": TensorSpec((self.config.boft_n_butterfly_factor, number, size, size), "zeros"),
            "boft_s": TensorSpec(scale, "ones"),
        }

    def initialize(self, p: Tensors) -> None:
        if not self.config.init_weights:
            p.boft_R.normal_(std=0.1)
            p.boft_s.normal_(mean=1.0, std=0.1)

    def dropped(self, p: Tensors) -> Tensors:
        if not self.config.boft_dropout:
            return p
        factors, number = p.boft_R.shape[:2]
        unturned = torch.zeros(factors, number, 1, 1, dtype=torch.bool, device=p.boft_R.device)
        unturned[torch.randint(factors, ()), :, 0, 0] = chosen_blocks(number, self.config.boft_dropout, unturned.device)
        return Tensors(p | {"boft_R": p.boft_R.masked_fill(unturned, 0)})

    def before(self, p: Tensors, x: Tensor) -> Tensor:
        rotations = cayley((p.boft_R - p.boft_R.mT) / 2)
        half = self.blocks[1] // 2
        for exponent in reversed(range(len(rotations))):
            apart = 2**exponent
            x = interleave(x, 2, apart, half) if exponent else x
            x = rotate_blocks(x, rotations[exponent])
            x = interleave(x, apart, 2, half) if exponent else x
        return x

    def after(self, p: Tensors, y: Tensor) -> Tensor:
        return y * p.boft_s.flatten()


def interleave(x: Tensor, rows: int, columns: int, width: int) -> Tensor:
    """Runs of rows x columns pieces of `width` features in x [..., features], reordered from row by row to column by
    column. Swapping rows and columns undoes it."""
    return x.unflatten(-1, (-1, rows, columns, width)).transpose(-3, -2).flatten(-4)
