"""CorDA: start from the singular directions of W C, C the covariance of the layer's inputs (Yang et al., 2406.05223).

`ipm` takes the largest directions (adapt to what the data use), `kpm` the smallest (keep what the data use untouched).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from peftcli.adapters.initializers import require_rank
from peftcli.adapters.initializers.observe import evaluating, inputs_seen, linear_sites
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peftcli.adapters.methods.lora import LoraConfig

MAX_INVERSE_ERROR = 0.05  # of C C^-1 from the identity; the ridge grows until it is met


@dataclass
class CordaConfig:
    """How CorDA chooses.

    Attributes:
        corda_method: `ipm` (instruction-previewed) or `kpm` (knowledge-preserved).
    """

    corda_method: Literal["ipm", "kpm"] = "ipm"


def preprocess_corda(model: nn.Module, lora_config: LoraConfig, run_model: Callable[[], Any]) -> None:
    """Compute the start of every targeted layer and keep it in the config; then call `get_peft_model`.

    Args:
        model: the base.
        lora_config: its `init_lora_weights` is `corda`.
        run_model: passes a few hundred samples through the model.
    """
    settings: Any = lora_config.corda_config or CordaConfig()
    sites = linear_sites(model, lora_config, purpose="CorDA")
    sums: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        x = x / x.abs().max().clamp_min(1e-12)  # only the directions matter
        sums[name] = sums.get(name, 0) + x.T @ x

    with evaluating(model), inputs_seen({name: site.module for name, (site, _) in sites.items()}, see):
        run_model()
    if missing := sorted(set(sites) - set(sums)):
        raise InputError("run_model did not reach this layer", place=missing[0])
    lora_config.prepared = {
        name: corda(site.weight().float(), sums[name], adapter.r, adapter.scaling, settings.corda_method)  # type: ignore[attr-defined]
        for name, (site, adapter) in sites.items()
    }


def corda(weight: Tensor, covariance: Tensor, r: int, scaling: float, method: str) -> tuple[Tensor, Tensor]:
    """A0 [r, in] and B0 [out, r] from W C = U S V^T: B0 A0 s = U S V^T C^-1 on the chosen directions."""
    require_rank("corda", r, weight)
    covariance, inverse = _invertible(covariance)
    u, s, vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
    chosen = slice(0, r) if method == "ipm" else slice(s.numel() - r, s.numel())
    root = (s[chosen] / scaling).sqrt()
    return root[:, None] * (vh[chosen] @ inverse), u[:, chosen] * root


def _invertible(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """C with the smallest ridge that lets it be inverted, and its inverse."""
    identity = torch.eye(len(covariance), device=covariance.device)
    ridge = 0.01 * covariance.diagonal().mean()
    while True:
        damped = covariance + ridge * identity
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity) < MAX_INVERSE_ERROR:
            return damped, inverse
        ridge = 2 * ridge
