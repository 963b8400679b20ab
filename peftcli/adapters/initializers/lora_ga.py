"""LoRA-GA: start in the singular directions of the first gradient, so that the first step is full fine-tuning's
(Wang et al. 2024, arXiv 2407.05000).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt

from peftcli.adapters.initializers.observe import linear_sites
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peftcli.adapters.methods.lora import LoraConfig

ITERATIONS = 4  # power iterations of the randomised SVD, as in the paper's code


@dataclass
class LoraGAConfig:
    """How LoRA-GA starts.

    Attributes:
        direction: which of the 2 r leading directions A and B take.
        scale: how B is scaled: `stable`, `weight_svd`, `gd_scale` or `unit`.
        stable_gamma: gamma of `stable`.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: Annotated[int, Gt(0)] = 16


def preprocess_loraga(model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any]) -> None:
    """Estimate the gradient of every targeted weight and keep the starts in the config; then call `get_peft_model`.

    Args:
        model: the base, not quantised.
        lora_config: its `init_lora_weights` is `lora_ga`.
        train_step: runs forward and backward on a few batches; gradients add up.
    """
    settings: Any = lora_config.lora_ga_config or LoraGAConfig()
    sites = linear_sites(model, lora_config, purpose="LoRA-GA")
    weights = {name: site.stored for name, (site, _) in sites.items()}
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise InputError(f"LoRA-GA does not support quantized models. Found quantized module: '{name}'.")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    train_step()
    lora_config.prepared = {}
    for name, (site, adapter) in sites.items():
        gradient = weights[name].grad
        if gradient is None:
            raise InputError("train_step gave this weight no gradient", place=name)
        matrix = gradient if site.weight().shape == gradient.shape else gradient.T
        r, scaling = adapter.r, adapter.scaling  # type: ignore[attr-defined]
        lora_config.prepared[name] = lora_ga(matrix.float(), site.weight().detach().float(), r, scaling, settings)
        weights[name].grad = None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before[name])


def lora_ga(gradient: Tensor, weight: Tensor, r: int, scaling: float, settings: LoraGAConfig) -> tuple[Tensor, Tensor]:
    """A0 [r, in] and B0 [out, r] from the gradient [out, in]."""
    if 2 * r > min(gradient.shape):
        raise InputError(f"LoRA-GA of rank {r} needs a weight of at least {2 * r} rows and columns", field="r")
    u, s, v = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=ITERATIONS)
    first, second = torch.arange(r), torch.arange(r, 2 * r)
    for_a, for_b = {
        "ArB2r": (first, second),
        "A2rBr": (second, first),
        "ArBr": (torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)),
        "random": (torch.randperm(2 * r)[:r],) * 2,
    }[settings.direction]
    a, b = v.T[for_a], u[:, for_b] * s[for_b]
    if settings.scale == "stable":
        b = b * len(weight) ** 0.25 / settings.stable_gamma**0.5
    elif settings.scale == "weight_svd":
        _, largest, _ = torch.svd_lowrank(weight, q=r, niter=ITERATIONS)
        b = b * largest[0] / s[for_b][0].clamp_min(1e-12)
    elif settings.scale == "gd_scale":
        a, b = a / scaling, b / scaling
    return a, b
