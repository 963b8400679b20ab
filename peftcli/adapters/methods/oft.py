"""OFT: W rotated by a block-diagonal orthogonal matrix R (Qiu et al. 2023, arXiv 2306.07280).

Two formats share the name. Today's turns the inputs, y = W R^T x + b; PEFT 0.13's turned the outputs (output_oft.py).
A config with `oft_block_size` means today's, one with `r` alone means 0.13's.
Constrained OFT (`coft`) keeps the parameters near zero; the projection is part of the function, parameters stay free.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le

from peftcli.adapters.base import Tensors, TensorSpec, TransformAdapter
from peftcli.adapters.config import TunerConfig, later
from peftcli.adapters.registry import Method
from peftcli.adapters.rotations import cayley, cayley_neumann, chosen_blocks, rotate_blocks, unpack_skew, within_ball
from peftcli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

HALVED_SINCE = (0, 18)
"""The PEFT that changed the Cayley-Neumann series, and the first to write its version into the config."""


@dataclass
class OFTConfig(TunerConfig):
    """OFT's fields, as in PEFT 0.13 and today's.

    Attributes:
        r: number of blocks. Without `oft_block_size` it asks for 0.13's format.
        oft_block_size: size of a block; one of the two must be 0. 32 if neither is given.
        module_dropout: share of the blocks left unturned in a training pass (0.13: probability of leaving out all).
        init_weights: start with the identity; False starts at random (for tests).
        coft: keep the parameters in a ball around zero.
        eps: radius of that ball, before it is shared among blocks.
        block_share: one block repeated along the diagonal.
        rank_pattern: r by module name or regular expression (0.13's format only).
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        bias: which biases are trained: `none`, those of adapted modules (`oft_only`), or `all`.
        use_cayley_neumann: approximate the inverse in Cayley's transform by a power series.
        num_cayley_neumann_terms: terms of that series.
        peft_version: PEFT that wrote the file. Its series differs before 0.18; files without a version are older.
    """

    peft_type = "OFT"
    prefix = "oft_"

    r: Annotated[int, Ge(0), Le(1 << 20)] | None = None
    module_dropout: Annotated[float, Ge(0), Le(1)] = 0.0
    init_weights: bool = True
    coft: bool = False
    eps: Annotated[float, Gt(0)] = 6e-5
    block_share: bool = False
    rank_pattern: dict[str, Annotated[int, Ge(1), Le(1 << 20)]] = later({}, since="0.13 and up to it")
    oft_block_size: Annotated[int, Ge(0), Le(1 << 16)] | None = later(None, since="0.14")
    fan_in_fan_out: bool = later(False, since="0.14")
    bias: Literal["none", "all", "oft_only"] = later("none", since="0.14")
    use_cayley_neumann: bool | None = later(None, since="0.16")
    num_cayley_neumann_terms: Annotated[int, Ge(1), Le(64)] | None = later(None, since="0.16")
    peft_version: str | None = later(None, since="0.18")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is None and self.oft_block_size is None:
            self.oft_block_size = 32
        if self.turns_outputs:
            return
        self.r = self.r or 0
        if self.use_cayley_neumann is None:
            self.use_cayley_neumann = True
        if self.num_cayley_neumann_terms is None:
            self.num_cayley_neumann_terms = 5
        if self.peft_version is None:  # only files say inference_mode
            self.peft_version = "0.17.0" if self.inference_mode else "0.18.0"

    @property
    def turns_outputs(self) -> bool:
        """Whether 0.13's format is meant."""
        return self.oft_block_size is None

    @property
    def last_is_halved(self) -> bool:
        """Whether the Cayley-Neumann series is that of PEFT 0.18 and later."""
        version = re.match(r"(\d{1,4})\.(\d{1,4})", self.peft_version or "")
        return version is None or (int(version[1]), int(version[2])) >= HALVED_SINCE

    def adapter_variant(self) -> Method | None:
        return Method("output_oft", "OFTConfig", "OutputOft") if self.turns_outputs else None

    def validate(self) -> None:
        super().validate()
        if self.turns_outputs:
            named = {"bias": self.bias != "none", "use_cayley_neumann": self.use_cayley_neumann is not None}
            for name in (name for name, given in named.items() if given):
                raise InputError("is not a field of OFT with `r` alone (PEFT 0.13's)", field=name)
            if not self.r:
                raise InputError(f"`r` should be a positive integer value but the value passed is {self.r}", field="r")
            return
        if self.rank_pattern:
            raise InputError("is a field of OFT without `oft_block_size` only (PEFT 0.13's)", field="rank_pattern")
        if not self.r and not self.oft_block_size:
            raise InputError("Either `r` or `oft_block_size` must be non-zero.", field="oft_block_size")
        if self.r and self.oft_block_size:
            raise InputError(
                f"You can only specify either r ({self.r}) or oft_block_size ({self.oft_block_size}), but not both",
                field="oft_block_size",
                fix="their product is the number of inputs; set one of them to 0",
            )


class Oft(TransformAdapter):
    """Blocks that turn the inputs (of an embedding: the outputs). Parameters are entries above the diagonal."""

    kinds = frozenset({"linear", "conv", "embedding", "attention"})
    config: OFTConfig

    @property
    def acts_on_inputs(self) -> bool:
        return self.shape.kind != "embedding"

    @property
    def acts_on_outputs(self) -> bool:
        return not self.acts_on_inputs

    @property
    def features(self) -> int:
        """How many features are turned."""
        return self.shape.matrix[1] if self.acts_on_inputs else self.shape.out_features

    @cached_property
    def block_size(self) -> int:
        if self.config.r:
            return self.features // _divisor("r", self.config.r, self.features)
        return _divisor("oft_block_size", self.config.oft_block_size or 1, self.features)

    @property
    def key(self) -> str:
        return "oft_R.weight" if self.acts_on_inputs else "oft_embedding_R.weight"

    def tensors(self) -> dict[str, TensorSpec]:
        blocks = 1 if self.config.block_share else self.features // self.block_size
        entries = self.block_size * (self.block_size - 1) // 2
        return {self.key: TensorSpec((blocks, entries), "zeros")}

    def initialize(self, p: Tensors) -> None:
        if not self.config.init_weights:
            p[self.key].normal_(std=0.1)

    def dropped(self, p: Tensors) -> Tensors:
        if not self.config.module_dropout:
            return p
        packed = p[self.key]
        unturned = chosen_blocks(packed.shape[0], self.config.module_dropout, packed.device)
        return Tensors({self.key: packed.masked_fill(unturned[:, None], 0)})

    def rotation(self, p: Tensors) -> Tensor:
        """The blocks [blocks, size, size]."""
        config = self.config
        skew = unpack_skew(p[self.key], self.block_size)
        if config.coft:
            skew = within_ball(skew, config.eps)
        if not config.use_cayley_neumann:
            return cayley(skew)
        return cayley_neumann(skew, config.num_cayley_neumann_terms or 1, last_is_halved=config.last_is_halved)

    def before(self, p: Tensors, x: Tensor) -> Tensor:
        return rotate_blocks(x, self.rotation(p))

    def after(self, p: Tensors, y: Tensor) -> Tensor:
        return rotate_blocks(y, self.rotation(p))


def _divisor(name: str, wanted: int, features: int) -> int:
    """The divisor of `features` nearest to the wanted number, the lower of two; with PEFT's warning if it differs."""
    lower = [n for n in range(1, math.isqrt(features) + 1) if features % n == 0]
    nearest = min({*lower, *(features // n for n in lower)}, key=lambda n: (abs(n - wanted), n))
    if nearest != wanted:
        warnings.warn(f"Invalid `{name}` ({wanted})! Adjusted `{name}` to ({nearest}).", stacklevel=2)
    return nearest
