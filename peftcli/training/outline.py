"""A run's model without its weights: whether the adapter fits the base, and how much of it is trained."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch  # noqa: TID253
from torch import nn  # noqa: TID253

from peftcli import get_peft_model
from peftcli.adapters.config import PeftConfig, TaskType
from peftcli.adapters.engine import adapters_of
from peftcli.adapters.targets import unmatched_patterns
from peftcli.errors import InputError, InputErrors, printable
from peftcli.launchers.configs import shards_base
from peftcli.recipe.adapter_section import settable
from peftcli.recipe.schema import Recipe
from peftcli.training.model import open_base
from peftcli.training.optimizers import loraplus_groups
from peftcli.training.strategies.zero3 import require_fused_experts


@dataclass(frozen=True)
class Outline:
    """Facts of a model that was never loaded.

    Attributes:
        dtype: what the base's weights are loaded as.
        parameters: of the base.
        trainable: parameters that are trained, the adapter's or all.
        adapted: modules that got an adapter.
        linear: linear modules of the base, for comparison.
    """

    dtype: str
    parameters: int
    trainable: int
    adapted: int
    linear: int


def outline(recipe: Recipe) -> Outline:
    """Build the recipe's model on the meta device.

    Raises:
        InputError: the base can't be used, or the adapter does not fit it (a target that matches nothing, a size that
            does not divide); `field` names the recipe's.
    """
    base, training = open_base(recipe.model), recipe.training
    with torch.device("meta"):
        model: nn.Module = base.empty()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        linear = sum(isinstance(module, nn.Linear) for module in model.modules())
        if recipe.launcher.type == "deepspeed" and shards_base(recipe):
            require_fused_experts(model)
        if recipe.adapter.config is not None:
            model = adapted(model, recipe.adapter.config, recipe.model.task_type)
    if training.loraplus_lr_ratio is not None:
        loraplus_groups(model, training.learning_rate, training.loraplus_lr_ratio)  # refuses adapters without lora_B
    return Outline(
        dtype=str(base.dtype).removeprefix("torch."),
        parameters=parameters,
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        adapted=0 if recipe.adapter.config is None else sum(1 for _ in adapters_of(model).layers()),
        linear=linear,
    )


def adapted(model: nn.Module, config: PeftConfig, task_type: str) -> nn.Module:
    """A model on the meta device with a recipe's adapter.

    Raises:
        InputError: the adapter does not fit; `field` names the recipe's.
    """
    config = copy.deepcopy(config)
    config.task_type = TaskType(task_type)
    try:
        model = get_peft_model(model, config, low_cpu_mem_usage=True)
    except InputError as error:
        if isinstance(error, InputErrors) or error.field not in set(settable(type(config))):
            raise
        raise error.at(field=f"adapter.{error.field}") from None
    attached = adapters_of(model)
    named = [adapter.shape.name for name in attached.configs for adapter, _ in attached.sites(name)]
    for field, key in unmatched_patterns(config, named):
        warnings.warn(f"adapter.{field}: `{printable(key, 200)}` matches no module that is adapted", stacklevel=2)
    return model
