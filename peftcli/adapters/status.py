"""What adapters a model has and what state they are in, layer by layer and in all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast

from torch import nn  # noqa: TID253

from peftcli.adapters.engine import Attached, attached_to, user_model
from peftcli.errors import InputError

Irregular = Literal["irregular"]
"""What a fact is where layers disagree: something was changed behind the model's back."""

Value = TypeVar("Value")


@dataclass
class TunerLayerStatus:
    """One adapted layer.

    Attributes:
        name: path in the user's model.
        module_type: PEFT type of its adapters, in lower case.
        enabled: whether adapters act.
        active_adapters, merged_adapters, available_adapters: names.
        requires_grad: by adapter, whether its tensors are trained; `irregular` where they differ.
        devices: by adapter, where its tensors are.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class TunerModelStatus:
    """All adapted layers of a model together; a fact they disagree on is `irregular`."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of every adapted layer of a PeftModel, or of a model that adapters were injected into."""
    attached = _attached(model)
    found = []
    for path, layer in attached.layers():
        tensors = {name: [t for _, t in layer.own_tensors(name)] for name in layer.adapters}
        trained = {name: [t for slot, t in layer.own_tensors(name) if slot.spec.trainable] for name in layer.adapters}
        found.append(
            TunerLayerStatus(
                name=path,
                module_type="/".join(sorted({attached.configs[name].peft_type.lower() for name in layer.adapters})),
                enabled=not layer.disable_adapters,
                active_adapters=list(layer.active_adapters),
                merged_adapters=list(layer.merged_adapters),
                requires_grad={name: _agree(t.requires_grad for t in trained[name]) for name in layer.adapters},
                available_adapters=sorted(layer.adapters),
                devices={name: sorted({t.device.type for t in tensors[name]}) for name in layer.adapters},
            )
        )
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of a PeftModel, or of a model that adapters were injected into."""
    attached = _attached(model)
    layers = get_layer_status(model)
    base = user_model(model)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type=type(getattr(model, "base_model", None)).__name__ if base is not model else "None",
        peft_types={name: config.peft_type for name, config in attached.configs.items()},
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_params=sum(p.numel() for p in model.parameters()),
        num_adapter_layers=len(layers),
        enabled=_agree(layer.enabled for layer in layers),
        active_adapters=_agree(layer.active_adapters for layer in layers),
        merged_adapters=_merged(layers),
        requires_grad={
            name: _agree(layer.requires_grad[name] for layer in layers if name in layer.requires_grad) for name in names
        },
        available_adapters=names,
        devices={name: sorted({d for layer in layers for d in layer.devices.get(name, [])}) for name in names},
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; packed 4-bit weights count as what they stand for, sharded ones whole."""
    trainable = total = 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", None) or parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count = parameter.numel() * 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def _merged(layers: list[TunerLayerStatus]) -> list[str] | Irregular:
    """Names merged in every layer that has them."""
    merged = {name for layer in layers for name in layer.merged_adapters}
    partly = any(merged & set(layer.available_adapters) - set(layer.merged_adapters) for layer in layers)
    return "irregular" if partly else sorted(merged)


def _agree(values: Iterable[Value]) -> Value | Irregular:
    seen = list(values)
    if not seen:
        return cast(Value, False)
    return seen[0] if all(value == seen[0] for value in seen) else "irregular"


def _attached(model: nn.Module) -> Attached:
    attached = attached_to(user_model(model))
    if attached is None or next(attached.layers(), None) is None:
        raise InputError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters "
            "injected in the model."
        )
    return attached
