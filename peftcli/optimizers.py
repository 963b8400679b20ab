"""Optimizers for adapters under the names PEFT's documentation uses (`peft.optimizers`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["create_lorafa_optimizer", "create_loraplus_optimizer"]


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **options: Any
) -> Optimizer:
    """An optimizer in which B learns `loraplus_lr_ratio` times as fast as A (LoRA+, arXiv 2402.12354).

    Args:
        model: a model with LoRA adapters.
        optimizer_cls: e.g. `torch.optim.AdamW`, or an 8-bit one of bitsandbytes.
        lr: rate of A.
        loraplus_lr_ratio: at least 1.
        options: `loraplus_weight_decay`, `loraplus_lr_embedding`; the rest goes to the optimizer.
    """
    from peftcli.training.optimizers import loraplus_groups

    groups = loraplus_groups(
        model,
        lr,
        loraplus_lr_ratio,
        weight_decay=options.pop("loraplus_weight_decay", 0.0),
        embedding_learning_rate=options.pop("loraplus_lr_embedding", 1e-6),
    )
    return optimizer_cls(groups, lr=lr, **options)  # type: ignore[call-arg]


def create_lorafa_optimizer(*args: Any, **options: Any) -> Optimizer:
    """An AdamW that leaves A as it began and gives B a least-squares step (LoRA-FA): see `training.lorafa`."""
    from peftcli.training.lorafa import create_lorafa_optimizer

    return create_lorafa_optimizer(*args, **options)
