"""FRoD: W' = U (diag(l) + S) V^T, a V for each role of a module in the model's layers, learnt are l and the sparse S
(2026, doi 10.1609/aaai.v40i31.39813).

V comes from the weights of all modules of one role (`self_attn_q_proj`), by the joint decomposition of a higher-order
GSVD; U has unit columns. With S = 0 the product is the base weight again. V and the places of S are kept once a model.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from peftcli.adapters.base import Adapter, DeltaAdapter, Tensors, TensorSpec
from peftcli.adapters.config import PeftConfig, TunerConfig
from peftcli.adapters.methods.loha import Probability
from peftcli.adapters.methods.vera import Seed, check_projections
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class FrodConfig(TunerConfig):
    """FRoD's fields, as in PEFT.

    Attributes:
        sparse_rate: share of S's entries that are learnt, off the diagonal.
        regularization_alpha: ridge of the joint decomposition, against modules that are much alike.
        projection_prng_key: seed of S's places.
        save_projection: store V and S's places in the file; otherwise they are made again from base and seed.
        frod_dropout: dropout on the input of the adapter's path.
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        bias: which biases are trained: `none`, those of adapted modules (`frod_only`), or `all`.
        init_weights: True (no change at first) or False (random: for tests).
        progressbar, runtime_offload_base_weight: accepted and not used.
    """

    peft_type = "FROD"
    prefix = "frod_"
    absent = frozenset({"exclude_modules"})

    projection_prng_key: Seed = 0
    save_projection: bool = True
    frod_dropout: Probability = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "frod_only"] = "none"
    init_weights: bool = True
    sparse_rate: Annotated[float, Ge(0), Le(1)] = 0.01
    regularization_alpha: Annotated[float, Gt(0)] = 1e-3
    progressbar: bool = True
    runtime_offload_base_weight: bool = False

    def check_beside(self, others: list[PeftConfig]) -> None:
        check_projections("FRoD", self, [other for other in others if isinstance(other, FrodConfig)])


class Frod(DeltaAdapter):
    """U (diag(l) + S) V^T less the base weight."""

    kinds = frozenset({"linear", "conv"})
    config: FrodConfig

    @cached_property
    def role(self) -> str:
        """What the module is in its layer; all of one role share V."""
        parts = self.shape.name.split(".")
        if parts[-3:] == ["attention", "output", "dense"]:  # BERT's; another `output.dense` ends its feed-forward part
            return "attention_output"
        return parts[-1] if len(parts) == 1 or parts[-2].isdigit() else "_".join(parts[-2:])

    @property
    def dropout(self) -> float:
        return self.config.frod_dropout

    def tensors(self) -> dict[str, TensorSpec]:
        out_features, in_features = self.shape.matrix
        least = int(self.config.sparse_rate > 0)
        entries = min(max(int(in_features**2 * self.config.sparse_rate), least), in_features * (in_features - 1))
        once: dict[str, Any] = {"trainable": False, "shared": True, "saved": self.config.save_projection}
        return {
            "frod_lambda_l": TensorSpec((in_features,)),
            "frod_lambda_s_values": TensorSpec((entries,), "zeros"),
            "frod_U": TensorSpec((out_features, in_features), trainable=False, saved=False),
            f"frod_V.{self.role}": TensorSpec((in_features, in_features), **once),
            f"frod_s_indices.{self.role}": TensorSpec((2, entries), dtype="int64", **once),
            f"frod_s_size.{self.role}": TensorSpec((2,), dtype="int64", **once),
        }

    @classmethod
    def make_shared(cls, adapters: list[Adapter], config: FrodConfig) -> dict[str, Tensor]:
        """V from the weights and the places of S from the seed, on the CPU whatever the device."""
        roles: dict[str, dict[int, Frod]] = defaultdict(dict)
        sizes: dict[str, int] = {}
        for number, adapter in enumerate(adapters):
            assert isinstance(adapter, Frod)
            if adapter.weight().is_meta:
                return {}
            role, size = adapter.role, adapter.shape.matrix[1]
            if size != sizes.setdefault(role, size):
                raise InputError(
                    f"has not the {sizes[role]} inputs of other modules called {role}", place=adapter.shape.name
                )
            roles[role][_layer(adapter.shape.name, number)] = adapter
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        made: dict[str, Tensor] = {}
        for role, layers in sorted(roles.items()):
            first, size = next(iter(layers.values())), sizes[role]
            weights = [layers[layer].weight().detach().cpu().float() for layer in sorted(layers)]
            basis = _joint_basis(weights, config.regularization_alpha)
            places = torch.randperm(size * (size - 1), generator=generator)
            places = places[: first.tensors()["frod_lambda_s_values"].shape[0]]
            row, column = places // max(size - 1, 1), places % max(size - 1, 1)
            made[f"frod_V.{role}"] = basis.to(first.weight().dtype).float()
            made[f"frod_s_indices.{role}"] = torch.stack([row, column + (column >= row)])  # the diagonal left out
            made[f"frod_s_size.{role}"] = torch.tensor([size, size])
        return made

    def initialize(self, p: Tensors) -> None:
        p.frod_lambda_l.copy_(self._start(p))
        if not self.config.init_weights:
            p.frod_lambda_s_values.normal_(std=0.1)
            p.frod_lambda_l.add_(torch.randn_like(p.frod_lambda_l), alpha=0.1)

    def regenerate(self, p: Tensors) -> None:
        self._start(p)

    def _start(self, p: Tensors) -> Tensor:
        """Fill U and return l so that U diag(l) V^T is the base weight."""
        basis, weight = (matrix.detach().cpu().double() for matrix in (p[f"frod_V.{self.role}"], self.weight()))
        try:
            scaled = torch.linalg.solve(basis, weight.T).T
        except RuntimeError:  # singular
            scaled = weight @ torch.linalg.pinv(basis, rtol=1e-6).T
        scales = scaled.norm(dim=0)
        p.frod_U.copy_(torch.where(scales > 1e-12, scaled / scales, 0.0))
        return scales.float()

    def delta(self, p: Tensors) -> Tensor:
        # Built once a pass: the difference to W is small, and would drown in the rounding of two large activations.
        row, column = p[f"frod_s_indices.{self.role}"]
        middle = torch.diag(p.frod_lambda_l).index_put((row, column), p.frod_lambda_s_values)
        basis = p[f"frod_V.{self.role}"].to(middle.dtype)
        return (p.frod_U @ middle @ basis.T - self.weight().to(middle.dtype)) * self.scaling


def _layer(path: str, number: int) -> int:
    """The layer a module belongs to, as its path says, or else its number."""
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in (*after, *parts) if part.isdigit()), number)


def _joint_basis(weights: list[Tensor], ridge: float) -> Tensor:
    """V [in, in] of a higher-order GSVD of weights [out_i, in] (Kempf et al. 2023, "A higher-order generalized SVD for
    rank-deficient matrices")."""
    stacked = torch.cat(weights)
    if stacked.shape[0] < stacked.shape[1]:
        return torch.linalg.svd(stacked, full_matrices=True).Vh.T
    q, r = torch.linalg.qr(stacked)
    identity = torch.eye(len(r))
    inverses = [torch.linalg.inv(part.T @ part + ridge * identity) for part in q.split([len(w) for w in weights])]
    mean = torch.zeros_like(r)
    for inverse in inverses:
        mean += inverse
    return r.T @ torch.linalg.eigh(mean / len(inverses)).eigenvectors
