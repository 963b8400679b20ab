"""DEFT: W' = (I - P P+^T) W + s P R: what W gives in a learnt subspace is taken away and put back learnt
("Decompositional efficient fine-tuning for text-to-image models", NeurIPS 2025). PaRa (arXiv 2406.05641) only takes away.

P+ is relu(P), or P is replaced by the Q of its QR decomposition, and so is P+: then P P+^T is a projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peftcli.adapters.base import LowRankAdapter, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.methods.loha import Probability
from peftcli.adapters.methods.lora import Rank
from peftcli.lazy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import Site


@dataclass
class DeftConfig(TunerConfig):
    """DEFT's fields, as in PEFT.

    Attributes:
        r: dimension of the subspace; capped at a module's outputs.
        decomposition_method: what P+ is, `relu` or `qr`.
        init_scale: factor on R's deviation where it starts random.
        alpha: numerator of the scaling alpha / r of what is put back; None is no scaling.
        para: only take away; there is no R.
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        deft_dropout: dropout on the input of R.
        init_weights: True: R starts as what is taken away, so nothing changes at first. False: random.
        bias: which biases are trained: `none`, those of adapted modules (`deft_only`), or `all`.
    """

    peft_type = "DEFT"
    prefix = "deft_"

    r: Rank = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: float | int = 1.0
    alpha: int | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: Probability = 0.0
    init_weights: bool = True
    bias: Literal["none", "all", "deft_only"] = "none"


class Deft(LowRankAdapter):
    """P (s R - P+^T W)."""

    config: DeftConfig

    @property
    def r(self) -> int:
        return min(self.config.r, self.shape.matrix[0])

    @property
    def drops(self) -> bool:
        return self.config.deft_dropout > 0

    def initial_scaling(self) -> float:
        return self.config.alpha / self.r if self.config.alpha else 1.0

    def tensors(self) -> dict[str, TensorSpec]:
        out_features, in_features = self.shape.matrix
        specs = {"deft_P": TensorSpec((out_features, self.r))}
        return specs if self.config.para else {**specs, "deft_R": TensorSpec((self.r, in_features))}

    def initialize(self, p: Tensors) -> Tensor | None:
        p.deft_P.normal_(std=0.02)
        if self.config.para:
            return None
        if self.config.init_weights:
            p.deft_R.copy_(self._removed(p)[0] / self.scaling)
        else:
            p.deft_R.normal_(std=0.02 * self.config.init_scale)
        return None

    def _removed(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """P+^T W [r, in] and P [out, r]."""
        precise = p.deft_P.to(torch.promote_types(p.deft_P.dtype, torch.float32))
        if self.config.decomposition_method == "qr":
            left = right = torch.linalg.qr(precise)[0]
        else:
            left, right = precise, precise.relu()
        return right.T @ self.weight().to(precise.dtype), left

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        removed, left = self._removed(p)
        return (-removed if self.config.para else p.deft_R * self.scaling - removed), left

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        if self.config.para or not (self.training and self.drops):
            return super().activation(p, x, site)
        removed, left = self._removed(p)
        kept = functional.dropout(x, self.config.deft_dropout)
        return site.low_rank(kept, p.deft_R * self.scaling, left) - site.low_rank(x, removed, left)
