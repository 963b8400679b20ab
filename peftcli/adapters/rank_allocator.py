"""AdaLoRA's rank allocator: which triplets are worth their parameters, by sensitivity smoothed over steps.

The importance of a number w with gradient g is |w g|, smoothed, times the smoothed distance of |w g| from that: what
matters often, but not evenly, is still uncertain. A triplet's is that of its value plus the means of its two vectors.
All state lies in the adapters' own tensors, so a checkpoint of them is a checkpoint of the allocator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253

from peftcli.adapters.base import Tensors
from peftcli.errors import InputError

if TYPE_CHECKING:
    from peftcli.adapters.methods.adalora import AdaLoraConfig

TRIPLET = ("lora_A", "lora_B", "lora_E")


@torch.no_grad()
def allocate(sites: list[Tensors], config: AdaLoraConfig, step: int) -> None:
    """What follows optimizer step `step` (counted from 1): measure, and at the steps due take triplets away.

    Args:
        sites: one adapter's tensors at each module, gradients still there.
        config: with `total_step` set.
        step: from `total_step - tfinal` on, the choice is final.

    Raises:
        InputError: `total_step` is None, or there are no gradients.
    """
    if config.total_step is None:
        raise InputError("AdaLoRA does not work when `total_step` is None, supply a value > 0.", field="total_step")
    final = config.total_step - config.tfinal
    if step < final:
        for p in sites:
            measure(p, config)
    if step == final or (config.tinit < step < final and step % config.deltaT == 0):
        choose(sites, budget(config, sum(len(p.lora_E) for p in sites), len(sites), step))
    if step >= final:
        for p in sites:
            p.lora_E[~p.lora_kept] = 0


def budget(config: AdaLoraConfig, first: int, modules: int, step: int) -> int:
    """How many triplets the whole model may have: from `first` down to target_r a module, along a cubic."""
    assert config.total_step is not None
    last = config.target_r * modules
    begin, end = config.tinit, config.total_step - config.tfinal
    left = 1 - (min(max(step, begin), end) - begin) / (end - begin)
    return int((first - last) * left**3 + last)


def measure(p: Tensors, config: AdaLoraConfig) -> None:
    """Bring importance and uncertainty up to date with this step's gradients."""
    for name in TRIPLET:
        now = sensitivity(p[name], name, "AdaLoRA")
        importance, uncertainty = p[f"{name}_importance"], p[f"{name}_uncertainty"]
        importance.mul_(config.beta1).add_(now, alpha=1 - config.beta1)
        uncertainty.mul_(config.beta2).add_((now - importance).abs_(), alpha=1 - config.beta2)


def sensitivity(weight: Tensor, name: str, method: str) -> Tensor:
    """|weight * gradient|, by which a method that allocates judges each value.

    Raises:
        InputError: there is no gradient.
    """
    if weight.grad is None:
        raise InputError(
            f"{name} has no gradient: {method} allocates after optimizer.step() and before zero_grad(), and can't "
            "where gradients are sharded (ZeRO, FSDP)"
        )
    return (weight * weight.grad).abs()


def scores(p: Tensors) -> Tensor:
    """The importance [r] of each triplet."""
    a, b, e = (p[f"{name}_importance"] * p[f"{name}_uncertainty"] for name in TRIPLET)
    return e.flatten() + a.mean(1) + b.mean(0)


def choose(sites: list[Tensors], count: int) -> None:
    """Keep the `count` best triplets of the model and set the values of all others to zero. Ties at the edge go."""
    ranked = [scores(p).cpu() for p in sites]
    everything = torch.cat(ranked)
    surplus = len(everything) - count
    edge = everything.kthvalue(surplus).values if surplus > 0 else everything.new_tensor(-1.0)
    for p, score in zip(sites, ranked, strict=True):
        p.lora_kept.copy_(score > edge)
        p.lora_E[~p.lora_kept] = 0
