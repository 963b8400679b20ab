"""OSF: the large singular directions of the weight stay, the small ones are trained (Nayak et al. 2025, arXiv 2504.07097).

W = U S V^T is split at the effective rank. dW = U_low S_low V_low - (its start), and the gradients of U_low and V_low are
projected off the large directions, so that what the base knows best is not written over. For continual learning.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt, Le

from peftcli.adapters.base import DeltaAdapter, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.targets import pattern_value
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Kept = Annotated[int, Gt(0)] | Annotated[float, Gt(0), Le(1)]


@dataclass
class OSFConfig(TunerConfig):
    """OSF's fields, as in PEFT.

    Attributes:
        effective_rank: how many directions stay: a number, or a share of the smaller dimension; half if None.
        rank_pattern: the same by an expression found anywhere in a module's name, where it differs.
        init_weights: False starts away from the base, for tests.
        target_svd_config: accepted and not used, as in PEFT.
    """

    peft_type = "OSF"
    prefix = "osf_"
    absent = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    effective_rank: Kept | None = None
    rank_pattern: dict[str, Kept] | None = None
    init_weights: bool | None = True
    target_svd_config: dict[str, int] | None = None


class Osf(DeltaAdapter):
    """U_low S_low V_low, less what it was."""

    config: OSFConfig

    @cached_property
    def kept(self) -> int:
        """How many directions stay."""
        smaller = min(self.shape.matrix)
        pattern = {rf".*({key}).*": rank for key, rank in (self.config.rank_pattern or {}).items()}
        rank: Any = pattern_value(pattern, self.shape.name, self.config.effective_rank)
        rank = 0.5 if rank is None else rank
        return min(max(int(rank * smaller) if isinstance(rank, float) else rank, 1), smaller)

    def tensors(self) -> dict[str, TensorSpec]:
        out_features, in_features = self.shape.matrix
        kept = self.kept
        low = min(out_features, in_features) - kept
        shapes = {"U_low": (out_features, low), "S_low": (low,), "V_low": (low, in_features)}
        fixed = {f"osf_start.{name}": shape for name, shape in shapes.items()}
        fixed |= {"osf_start.U_high": (out_features, kept), "osf_start.V_high": (kept, in_features)}
        return {f"osf_svd_params.{name}": TensorSpec(shape) for name, shape in shapes.items()} | {
            name: TensorSpec(shape, trainable=False, saved=False) for name, shape in fixed.items()
        }

    def initialize(self, p: Tensors) -> None:
        self.regenerate(p)
        for name in ("U_low", "S_low", "V_low"):
            start = p[f"osf_start.{name}"]
            p[f"osf_svd_params.{name}"].copy_(torch.randn_like(start) if self.config.init_weights is False else start)

    def regenerate(self, p: Tensors) -> None:
        u, s, vh = torch.linalg.svd(self.weight().float(), full_matrices=False)
        parts = {
            "U_low": u[:, self.kept :],
            "S_low": s[self.kept :],
            "V_low": vh[self.kept :],
            "U_high": u[:, : self.kept],
            "V_high": vh[: self.kept],
        }
        for name, part in parts.items():
            p[f"osf_start.{name}"].copy_(part)

    def delta(self, p: Tensors) -> Tensor:
        u_high, v_high = p["osf_start.U_high"], p["osf_start.V_high"]
        u, v = p["osf_svd_params.U_low"], p["osf_svd_params.V_low"]
        # The value is U_low; the gradient reaches it without its part in the large directions.
        u_step, v_step = u - u.detach(), v - v.detach()
        u = u.detach() + u_step - u_high @ (u_high.T @ u_step)
        v = v.detach() + v_step - (v_step @ v_high.T) @ v_high
        start = (p["osf_start.U_low"] * p["osf_start.S_low"]) @ p["osf_start.V_low"]
        return (u * p["osf_svd_params.S_low"]) @ v - start
