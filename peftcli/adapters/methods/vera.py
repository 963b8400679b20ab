"""VeRA: dW = diag(b) B diag(d) A with random A, B shared by all modules; only b, d are learnt (Kopiczko et al. 2023,
arXiv 2310.11454).

A [r, largest in] and B [largest out, r] come from a seed; a module takes the first columns of A and rows of B it needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le

from peftcli.adapters.base import Adapter, LowRankAdapter, Tensors, TensorSpec
from peftcli.adapters.config import PeftConfig, TunerConfig
from peftcli.adapters.methods.loha import Probability
from peftcli.adapters.methods.lora import Rank
from peftcli.errors import InputError
from peftcli.lazy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import Site

Seed = Annotated[int, Ge(0), Le((1 << 63) - 1)]


@dataclass
class VeraConfig(TunerConfig):
    """VeRA's fields, as in PEFT.

    Attributes:
        r: rank; far larger than LoRA's, since it costs one number each.
        projection_prng_key: seed of A and B.
        save_projection: store A and B in the file; otherwise they are made again from the seed.
        vera_dropout: dropout on the input of the adapter's path.
        d_initial: what d starts with; b starts at zero.
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        bias: which biases are trained: `none`, those of adapted modules (`vera_only`), or `all`.
        init_weights: True (no change at first) or False (random: for tests).
    """

    peft_type = "VERA"
    prefix = "vera_lambda_"

    r: Rank = 256
    projection_prng_key: Seed = 0
    save_projection: bool = True
    vera_dropout: Probability = 0.0
    d_initial: float | int = 0.1
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vera_only"] = "none"
    init_weights: bool = True

    def check_beside(self, others: list[PeftConfig]) -> None:
        check_projections("Vera", self, [other for other in others if isinstance(other, VeraConfig)])


def check_projections(method: str, config: Any, others: Iterable[Any]) -> None:
    """Refuse adapters of a model that disagree on their shared projections, in PEFT's words."""
    for other in others:
        if other.projection_prng_key != config.projection_prng_key:
            raise InputError(
                f"{method} PRNG initialisation key must be the same for all adapters. Got "
                f"config.projection_prng_key={config.projection_prng_key} but previous config had "
                f"{other.projection_prng_key}.",
                field="projection_prng_key",
            )
        if other.save_projection != config.save_projection:
            name = "VeRA" if method == "Vera" else method
            raise InputError(
                f"{name} projection weights must be saved for all adapters or none, but got multiple different "
                "values: [False, True]",
                field="save_projection",
            )


class Vera(LowRankAdapter):
    """diag(b) B diag(d) A."""

    config: VeraConfig

    @property
    def dropout(self) -> float:
        return self.config.vera_dropout

    def tensors(self) -> dict[str, TensorSpec]:
        (out_features, in_features), r = self.shape.matrix, self.config.r
        saved = self.config.save_projection
        return {
            "vera_lambda_b": TensorSpec((out_features,), "zeros"),
            "vera_lambda_d": TensorSpec((r,)),
            "vera_A": TensorSpec((r, in_features), trainable=False, saved=saved, shared=True),
            "vera_B": TensorSpec((out_features, r), trainable=False, saved=saved, shared=True),
        }

    def initialize(self, p: Tensors) -> Tensor | None:
        if self.config.init_weights:
            p.vera_lambda_d.fill_(self.config.d_initial)
        else:
            p.vera_lambda_d.normal_()
            p.vera_lambda_b.fill_(1)
        return None

    @classmethod
    def make_shared(cls, adapters: list[Adapter], config: Any) -> dict[str, Tensor]:
        """A and B from the seed, on the CPU whatever the device: the same numbers as in PEFT."""
        out_features, in_features = (max(sizes) for sizes in zip(*(a.shape.matrix for a in adapters), strict=True))
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        a, b = torch.empty(config.r, in_features), torch.empty(out_features, config.r)
        for tensor in (a, b):
            torch.nn.init.kaiming_uniform_(tensor, generator=generator)
        return {"vera_A": a, "vera_B": b}

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        a, b = self._projections(p)
        return a * (self.scaling * p.vera_lambda_d)[:, None], b * p.vera_lambda_b[:, None]

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        if self.shape.kind != "linear":
            return super().activation(p, x, site)
        # Scaling activations instead of A and B saves the products that would give A and B their gradients.
        a, b = (projection.to(x.dtype) for projection in self._projections(p))
        hidden = functional.linear(x, a) * (self.scaling * p.vera_lambda_d).to(x.dtype)
        return functional.linear(hidden, b) * p.vera_lambda_b.to(x.dtype)

    def _projections(self, p: Tensors) -> tuple[Tensor, Tensor]:
        out_features, in_features = self.shape.matrix
        return p.vera_A[:, :in_features], p.vera_B[:out_features]
