"""LoKr: dW = s kron(W1, W2), s = alpha / r, each factor dense or of rank r (Yeh et al. 2023, LyCORIS, arXiv 2309.14859).

PEFT 0.13 and older computed `alpha / r` and did not apply it; the version that repaired this also introduced
`rank_dropout_scale` (pull request 2180). A file without that key is therefore read with alpha = r, which says the same to
every version; and we write the key wherever s is not 1, so that an old PEFT refuses the file instead of ignoring s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from peftcli.adapters.base import Init, Tensors, TensorSpec
from peftcli.adapters.config import later
from peftcli.adapters.methods.loha import LycorisAdapter, LycorisConfig, rebuild
from peftcli.lazy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import Site


@dataclass
class LoKrConfig(LycorisConfig):
    """LoKr's fields, as in PEFT; those of `LycorisConfig` and:

    Attributes:
        decompose_both: factor W1 too, where r is less than half of its larger side.
        decompose_factor: the smaller factor of both dimensions where it divides them, else its upper bound; -1: as
            square as possible.
        rank_dropout_scale: scale the rows left by rank_dropout up.
        init_weights: also `lycoris`: W2 starts at zero instead of W1.
    """

    peft_type = "LOKR"
    prefix = "lokr_"

    decompose_both: bool = False
    decompose_factor: Literal[-1] | Annotated[int, Ge(1)] = -1
    rank_dropout_scale: bool = later(False, since="0.14")
    init_weights: bool | Literal["lycoris"] = True  # type: ignore[assignment]

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "rank_dropout_scale" in values:
            return values
        return {**values, "alpha": values.get("r", cls.r), "alpha_pattern": values.get("rank_pattern", {})}

    def to_saved_dict(self) -> dict[str, Any]:
        values = super().to_saved_dict()
        if (self.alpha, self.alpha_pattern) != (self.r, self.rank_pattern):
            values["rank_dropout_scale"] = self.rank_dropout_scale
        return values


class LoKr(LycorisAdapter):
    """kron(W1, W2), scaled: W1 [out1, in1], W2 [out2, in2 * kernel]."""

    config: LoKrConfig

    @property
    def rescales_rows(self) -> bool:  # type: ignore[override]
        return self.config.rank_dropout_scale

    @cached_property
    def sides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(out1, out2), (in1, in2)."""
        shape, factor = self.shape, self.config.decompose_factor
        return factorize(shape.out_features, factor), factorize(shape.in_features // shape.groups, factor)

    def tensors(self) -> dict[str, TensorSpec]:
        (out1, out2), (in1, in2) = self.sides
        r, kernel = self.r, self.shape.kernel
        how = self.config.init_weights
        first: Init = "zeros" if how is True else "kaiming"
        second: Init = "zeros" if how == "lycoris" else "kaiming"
        if self.config.decompose_both and r < max(out1, in1) / 2:
            specs = {"lokr_w1_a": TensorSpec((out1, r), first), "lokr_w1_b": TensorSpec((r, in1), "kaiming")}
        else:
            specs = {"lokr_w1": TensorSpec((out1, in1), first)}
        if r >= max(out2, in2) / 2:
            specs["lokr_w2"] = TensorSpec((out2, in2, *kernel), second)
        elif self.factors_kernel:
            specs["lokr_t2"] = TensorSpec(self.core_shape, "kaiming")
            specs["lokr_w2_a"] = TensorSpec((r, out2), "kaiming")
            specs["lokr_w2_b"] = TensorSpec((r, in2), second)
        else:
            specs["lokr_w2_a"] = TensorSpec((out2, r), "kaiming")
            specs["lokr_w2_b"] = TensorSpec((r, in2 * math.prod(kernel)), second)
        return specs

    def delta(self, p: Tensors) -> Tensor:
        first = self._first(p)
        if "lokr_t2" in p:
            second = rebuild(p.lokr_t2, p.lokr_w2_a, p.lokr_w2_b)
        elif "lokr_w2" not in p:
            second = p.lokr_w2_a @ p.lokr_w2_b
        elif len(self.shape.kernel) == 1:
            # PEFT multiplies this 3-D tensor as it is, which orders the elements in another way; so do its files.
            second = p.lokr_w2
        else:
            second = p.lokr_w2.flatten(1)
        return torch.kron(first, second.contiguous()).reshape(self.shape.matrix)

    @property
    def builds_delta(self) -> bool:
        return self.shape.kind != "linear"

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        """W2 and W1 on the two axes of x [..., in1, in2], and never their product."""
        if self.builds_delta:
            return None
        p = p.to(x.dtype)
        x = x.unflatten(-1, (-1, self.sides[1][1]))
        hidden = _on_rows(x, p.lokr_w2 if "lokr_w2" in p else p.lokr_w2_b)
        hidden = _on_rows(hidden.mT, self._first(p)).mT
        return (hidden if "lokr_w2" in p else _on_rows(hidden, p.lokr_w2_a)).flatten(-2)

    def _first(self, p: Tensors) -> Tensor:
        """W1, scaled."""
        return (p.lokr_w1 if "lokr_w1" in p else p.lokr_w1_a @ p.lokr_w1_b) * self.scaling


def _on_rows(x: Tensor, matrix: Tensor) -> Tensor:
    """`linear` as one product of matrices. Left to itself, torch picks another one when nothing takes a gradient."""
    return functional.linear(x.flatten(0, -2), matrix).unflatten(0, x.shape[:-1])


def factorize(dimension: int, factor: int) -> tuple[int, int]:
    """m <= n with m n = dimension: m is `factor` where it divides, else the largest divisor that is no larger.

    Args:
        dimension: what to split.
        factor: the wanted m; -1 for one near the square root.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    bound = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    m = next(m for m in range(bound, 0, -1) if dimension % m == 0)
    return m, dimension // m
