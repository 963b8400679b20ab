"""Optimizers by TrainingArguments' names, their parameter groups (LoRA+ too), and learning-rate schedules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import nn  # noqa: TID253
from torch.optim import SGD, AdamW, Optimizer  # noqa: TID253
from torch.optim.lr_scheduler import LRScheduler  # noqa: TID253

from peftcli.errors import InputError, nearest, printable
from peftcli.training.quantized import require_bitsandbytes
from peftcli.training.schedule import warmup_steps

if TYPE_CHECKING:
    from peftcli.recipe.training_section import TrainingSection

LORAPLUS_EMBEDDING_LEARNING_RATE = 1e-6  # PEFT's `loraplus_lr_embedding`

Group = dict[str, Any]


class Builder(Protocol):
    """Makes an optimizer from parameter groups that carry their own `lr` and `weight_decay`."""

    def __call__(self, groups: list[Group], settings: TrainingSection) -> Optimizer: ...


def check_optimizer(settings: TrainingSection) -> None:
    """Refuse an optimizer whose package is missing.

    Raises:
        InputError: naming the package.
    """
    if settings.optim in BITSANDBYTES:
        require_bitsandbytes(f"training.optim={settings.optim}", "use adamw_torch")


def build_optimizer(model: nn.Module, settings: TrainingSection) -> Optimizer:
    """The optimizer `settings.optim` over the model's trainable parameters.

    Raises:
        InputError: an unknown name, a missing package, or LoRA+ on a model without LoRA's B matrices.
    """
    builder = BUILDERS.get(settings.optim)
    if builder is None:
        raise InputError(
            f"unknown optimizer {printable(settings.optim)!r}",
            field="training.optim",
            allowed=", ".join(BUILDERS),
            fix=str(nearest(settings.optim, BUILDERS)) or None,
        )
    if settings.loraplus_lr_ratio is None:
        groups = plain_groups(model, settings.learning_rate, settings.weight_decay)
    else:
        groups = loraplus_groups(
            model, settings.learning_rate, settings.loraplus_lr_ratio, weight_decay=settings.weight_decay
        )
    return builder(groups, settings)


# -- parameter groups -----------------------------------------------------------------------------------------------


def plain_groups(model: nn.Module, learning_rate: float, weight_decay: float) -> list[Group]:
    """Matrices decay; biases, norms and other vectors don't."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return _groups(
        ([p for p in trainable if p.dim() > 1], learning_rate, weight_decay),
        ([p for p in trainable if p.dim() <= 1], learning_rate, 0.0),
    )


def loraplus_groups(
    model: nn.Module,
    learning_rate: float,
    ratio: float,
    *,
    embedding_learning_rate: float = LORAPLUS_EMBEDDING_LEARNING_RATE,
    weight_decay: float = 0.0,
) -> list[Group]:
    """LoRA+ (arXiv:2402.12354): B matrices and vectors learn `ratio` times as fast as A matrices.

    Embedding adapters have a rate of their own, as in PEFT's `create_loraplus_optimizer`.
    """
    a, embedding, b, vectors = [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        if any(part.startswith("lora_embedding_") for part in parts):
            embedding.append(parameter)
        elif parameter.dim() <= 1:
            vectors.append(parameter)
        elif "lora_B" in parts:
            b.append(parameter)
        else:
            a.append(parameter)
    if not b:
        raise InputError(
            "LoRA+ needs an adapter with `lora_B` matrices, and this model has none",
            field="training.loraplus_lr_ratio",
            fix="set it to null",
        )
    return _groups(
        (a, learning_rate, weight_decay),
        (embedding, embedding_learning_rate, weight_decay),
        (b, learning_rate * ratio, weight_decay),
        (vectors, learning_rate * ratio, 0.0),
    )


def _groups(*groups: tuple[list[nn.Parameter], float, float]) -> list[Group]:
    """The groups that have parameters."""
    return [{"params": params, "lr": lr, "weight_decay": decay} for params, lr, decay in groups if params]


# -- optimizers -----------------------------------------------------------------------------------------------------


# Groups carry their own rate; the default is set as well, since some of transformers' schedules read it.


def _adam_arguments(settings: TrainingSection) -> dict[str, Any]:
    betas = (settings.adam_beta1, settings.adam_beta2)
    return {"lr": settings.learning_rate, "betas": betas, "eps": settings.adam_epsilon}


def _adamw(groups: list[Group], settings: TrainingSection) -> Optimizer:
    return AdamW(groups, **_adam_arguments(settings))


def _adamw_fused(groups: list[Group], settings: TrainingSection) -> Optimizer:
    return AdamW(groups, fused=True, **_adam_arguments(settings))


def _sgd(groups: list[Group], settings: TrainingSection) -> Optimizer:
    return SGD(groups, lr=settings.learning_rate)


def _adafactor(groups: list[Group], settings: TrainingSection) -> Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=settings.learning_rate, scale_parameter=False, relative_step=False)


def _bitsandbytes(groups: list[Group], settings: TrainingSection) -> Optimizer:
    check_optimizer(settings)
    import bitsandbytes

    return getattr(bitsandbytes.optim, BITSANDBYTES[settings.optim])(groups, **_adam_arguments(settings))


BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
}
"""Class in `bitsandbytes.optim` by name."""


BUILDERS: dict[str, Builder] = {
    "adamw_torch": _adamw,
    "adamw_torch_fused": _adamw_fused,
    "sgd": _sgd,
    "adafactor": _adafactor,
    **dict.fromkeys(BITSANDBYTES, _bitsandbytes),
}


# -- schedules ------------------------------------------------------------------------------------------------------


def build_scheduler(optimizer: Optimizer, settings: TrainingSection, steps: int) -> LRScheduler:
    """The schedule `settings.lr_scheduler_type` over `steps` optimizer steps.

    Raises:
        InputError: the schedule doesn't take one of `lr_scheduler_kwargs`.
    """
    from transformers import get_scheduler

    try:
        return get_scheduler(
            settings.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup_steps(settings, steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(settings.lr_scheduler_kwargs),
        )
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the schedule {settings.lr_scheduler_type} refuses them: {error}",
            field="training.lr_scheduler_kwargs",
        ) from error
