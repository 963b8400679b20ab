"""AdaMSS's subspace allocator: which subspaces go on being trained, by sensitivity smoothed over steps.

A number w with gradient g is as important as |w g|, smoothed, times the smoothed distance of |w g| from what was smoothed
before. A subspace's importance is the mean over its A plus that over its B. From time to time the most important of all
modules together go on, and the rest stay as they are from then on: their values are put back after each step, so that nothing
depends on an optimizer's momentum, weight decay or how gradients are gathered. PEFT, with the same schedule, keeps one fewer.
All state lies in the adapters' own tensors, so a checkpoint of them is a checkpoint of the allocator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253

from peftcli.adapters.base import Tensors
from peftcli.adapters.rank_allocator import sensitivity

if TYPE_CHECKING:
    from peftcli.adapters.methods.adamss import AdamssConfig

PAIR = ("adamss_A", "adamss_B")


@torch.no_grad()
def allocate(sites: list[Tensors], config: AdamssConfig, step: int) -> None:
    """What follows optimizer step `step` (counted from 1): measure, and at the steps due let subspaces rest.

    Args:
        sites: one adapter's tensors at each module, gradients still there.
        config: `init_warmup` to `final_warmup` are the steps at which anything happens, both included.
        step: a multiple of `mask_interval` is one to choose at.

    Raises:
        InputError: there are no gradients.
    """
    everything = [(p, group) for p in sites for group in range(len(p.adamss_kept))]
    for p, group in everything:
        if not p.adamss_kept[group]:
            for name in PAIR:
                p[f"{name}.{group}"].copy_(p[f"{name}_importance.{group}"])
    if not config.init_warmup <= step <= config.final_warmup:
        return
    trained = [(p, group) for p, group in everything if p.adamss_kept[group]]
    for p, group in trained:
        measure(p, group, config)
    if step % config.mask_interval == 0:
        choose(trained, budget(config, len(everything), step))


def budget(config: AdamssConfig, total: int, step: int) -> int:
    """How many of `total` subspaces are trained after a step: from all down to the target, along a power of what is left."""
    left = 1 - (step - config.init_warmup) / (config.final_warmup - config.init_warmup)
    target = config.asa_target_subspaces
    return int(target + (total - target) * left**config.asa_schedule_exponent)


def measure(p: Tensors, group: int, config: AdamssConfig) -> None:
    """Bring a subspace's uncertainty, and then its importance, up to date with this step's gradients."""
    for name in PAIR:
        now = sensitivity(p[f"{name}.{group}"], f"{name}.{group}", "AdaMSS")
        importance, uncertainty = p[f"{name}_importance.{group}"], p[f"{name}_uncertainty.{group}"]
        uncertainty.lerp_((now - importance).abs_(), 1 - config.asa_uncertainty_beta)
        importance.lerp_(now, 1 - config.asa_importance_beta)


def score(p: Tensors, group: int) -> Tensor:
    """The importance () of a subspace."""
    products = (p[f"{name}_importance.{group}"] * p[f"{name}_uncertainty.{group}"] for name in PAIR)
    return torch.stack([product.mean() for product in products]).sum().cpu()


def choose(trained: list[tuple[Tensors, int]], count: int) -> None:
    """Keep the `count` best and start measuring anew. The values of the others are kept where their importance was."""
    scores = [float(score(p, group)) for p, group in trained]
    ranked = sorted(range(len(trained)), key=lambda index: -scores[index])
    for rank, index in enumerate(ranked):
        p, group = trained[index]
        kept = rank < count
        p.adamss_kept[group] = kept
        for name in PAIR:
            p[f"{name}_uncertainty.{group}"].zero_()
            if kept:
                p[f"{name}_importance.{group}"].zero_()
            else:
                p[f"{name}_importance.{group}"].copy_(p[f"{name}.{group}"])
