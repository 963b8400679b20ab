"""PSOFT: dW = U S (R - I) V^T, where U S V^T are the r largest singular parts of the weight and R turns their space
(https://openreview.net/forum?id=FSHrinMArK).

R = diag(b) C diag(a) with a rotation C by Cayley's transform. U, S and V come from the base, so they are not stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from peftcli.adapters.base import LowRankAdapter, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.methods.loha import Probability
from peftcli.adapters.methods.lora import Rank
from peftcli.adapters.methods.vera import Seed
from peftcli.adapters.rotations import cayley, cayley_neumann, unpack_skew, within_ball
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Terms = Annotated[int, Ge(1), Le(64)]


@dataclass
class PsoftConfig(TunerConfig):
    """PSOFT's fields, as in PEFT.

    Attributes:
        r: dimension of the space that is turned.
        psoft_alpha: PEFT divides S by alpha / r and multiplies dW by it: it says nothing.
        psoft_dropout: dropout on the input of the adapter's path.
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        ab_svd_init: where S stands: left of R (`psoft_init`), or half on each side of it (`pissa_init`).
        psoft_svd: `full`, or `lowrank` for torch.svd_lowrank.
        psoft_svd_lowrank_niter, random_seed: its power iterations and seed.
        psoft_orth: R's inner part is a rotation; False: any matrix.
        psoft_mag_b, psoft_mag_a: whether there is a diagonal left of it, and right.
        use_cayley_neumann: a power series of `num_cayley_neumann_terms` terms in place of the inverse.
        cayley_neumann_eps: bound of the norm of the skew matrix in that series.
        init_weights: True (no change at first) or False (random: for tests).
    """

    peft_type = "PSOFT"
    prefix = "psoft_"

    r: Rank = 32
    psoft_alpha: int = 32
    psoft_dropout: Probability = 0.0
    fan_in_fan_out: bool = False
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: Annotated[int, Ge(0), Le(1000)] = 10
    random_seed: Seed = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: Terms = 5
    cayley_neumann_eps: Annotated[float, Gt(0), Lt(1)] | None = None
    init_weights: bool = True


class Psoft(LowRankAdapter):
    """U S (R - I) V^T."""

    config: PsoftConfig

    @property
    def dropout(self) -> float:
        return self.config.psoft_dropout

    def tensors(self) -> dict[str, TensorSpec]:
        (out_features, in_features), r = self.shape.matrix, self.config.r
        if r > min(out_features, in_features):
            raise InputError(
                f"`r` ({r}) must be less than or equal to min(in_features, out_features) "
                f"({in_features}, {out_features})",
                place=self.shape.name,
                field="r",
            )
        shape = (r * (r - 1) // 2,) if self.config.psoft_orth else (r, r)
        specs = {"psoft_R.weight": TensorSpec(shape, "zeros")}
        for name, wanted in (("vector_b", self.config.psoft_mag_b), ("vector_a", self.config.psoft_mag_a)):
            specs |= {f"psoft_R.{name}": TensorSpec((r,), "ones")} if wanted else {}
        return {
            **specs,
            "psoft_A": TensorSpec((r, in_features), trainable=False, saved=False),
            "psoft_B": TensorSpec((out_features, r), trainable=False, saved=False),
        }

    def initialize(self, p: Tensors) -> Tensor | None:
        if not self.config.psoft_orth:
            p.psoft_R.copy_(torch.eye(self.config.r))
        if not self.config.init_weights:
            p.psoft_R.add_(torch.randn_like(p.psoft_R) * 0.1)
        return self.regenerate(p)

    def regenerate(self, p: Tensors) -> Tensor | None:
        u, s, vh = self._largest(self.weight().float())
        half = s.sqrt()
        left, right = (s, torch.ones_like(s)) if self.config.ab_svd_init == "psoft_init" else (half, half)
        p.psoft_A.copy_(vh * right[:, None])
        p.psoft_B.copy_(u * left)
        return None

    def _largest(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The r largest singular parts: [out, r], [r], [r, in]."""
        r = self.config.r
        if self.config.psoft_svd == "full":
            # No file holds these, so they must come out alike on every machine: in double precision, with the signs
            # single precision gives, as in PEFT.
            _, _, rough = torch.linalg.svd(weight, full_matrices=False)
            u, s, vh = (part.float() for part in torch.linalg.svd(weight.double(), full_matrices=False))
            signs = (rough[:r] * vh[:r]).sum(1).sign()
            return u[:, :r] * signs, s[:r], vh[:r] * signs[:, None]
        on_cpu = weight.device.type == "cpu"
        with torch.random.fork_rng(
            [] if on_cpu else [weight.device], device_type="cuda" if on_cpu else weight.device.type
        ):
            torch.manual_seed(self.config.random_seed)  # svd_lowrank takes no generator
            u, s, v = torch.svd_lowrank(weight, q=r, niter=self.config.psoft_svd_lowrank_niter)
        return u, s, v.T

    def _inner(self, p: Tensors) -> Tensor:
        """R [r, r]."""
        config, turned = self.config, p.psoft_R
        if config.psoft_orth:
            skew = unpack_skew(p.psoft_R, config.r)
            if not config.use_cayley_neumann:
                turned = cayley(-skew)
            else:
                if config.cayley_neumann_eps is not None:
                    skew = within_ball(skew.unsqueeze(0), config.cayley_neumann_eps).squeeze(0)
                turned = cayley_neumann(skew, config.num_cayley_neumann_terms)
        if config.psoft_mag_b:
            turned = p["psoft_R.vector_b"][:, None] * turned
        return turned * p["psoft_R.vector_a"] if config.psoft_mag_a else turned

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        change = self._inner(p)
        change = change - torch.eye(self.config.r, dtype=change.dtype, device=change.device)
        return change @ p.psoft_A * self.scaling, p.psoft_B
