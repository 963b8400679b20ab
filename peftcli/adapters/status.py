"""What adapters a model has and what state they are in, layer by layer and in all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast

from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters.copies import CopyLayer
from peftcli.adapters.engine import Attached, attached_to, user_model
from peftcli.adapters.layer import AdapterLayer
from peftcli.adapters.quantized import backend_of
from peftcli.errors import InputError

Irregular = Literal["irregular"]
"""What a fact is where layers disagree: something was changed behind the model's back."""

Value = TypeVar("Value")


@dataclass
class TunerLayerStatus:
    """One adapted layer.

    Attributes:
        name: path in the tuner (`model.` and the path in the user's model), or in a model adapters were injected into.
        module_type: PEFT's name of the layer, e.g. `lora.Linear`.
        enabled: whether adapters act.
        active_adapters, merged_adapters, available_adapters: names.
        requires_grad: by adapter, whether its tensors are trained; `irregular` where they differ.
        devices: by adapter, where its tensors are.
        quantization_backend: what quantised the module, e.g. `bnb 4bit`, or None.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]] = field(default_factory=dict)
    quantization_backend: str | None = None


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
    quantization_backend: str | Irregular | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of every adapted layer of a PeftModel, or of a model that adapters were injected into.

    Raises:
        TypeError: a prompt adapts no layer.
        InputError: the model has no adapters.
    """
    attached = _attached(model, "get_layer_status")
    prefix = "" if user_model(model) is model else "model."
    return [_layer_status(prefix + path, part) for path, part in attached.named_parts()]


def _layer_status(name: str, part: AdapterLayer | CopyLayer) -> TunerLayerStatus:
    held: dict[str, list[tuple[Tensor, bool]]]  # tensors, and whether they are learnt
    if isinstance(part, CopyLayer):
        held = {key: [(t, True) for t in copy.parameters()] for key, copy in part.copies.items()}
        module = part.original
    else:
        held = {key: [(t, slot.spec.trainable) for slot, t in part.own_tensors(key)] for key in part.adapters}
        module = part.get_base_layer()
    return TunerLayerStatus(
        name=name,
        module_type=part._get_name(),
        enabled=not part.disable_adapters,
        active_adapters=list(part.active_adapters),
        merged_adapters=list(part.merged_adapters),
        requires_grad={key: _agree(t.requires_grad for t, learnt in held[key] if learnt) for key in held},
        available_adapters=sorted(held),
        devices={key: sorted({t.device.type for t, _ in held[key]}) for key in held},
        quantization_backend=backend_of(module),
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of a PeftModel, or of a model that adapters were injected into. Raises as `get_layer_status`."""
    attached = _attached(model, "get_model_status")
    layers = get_layer_status(model)
    base = user_model(model)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    injected = base is model
    trainable, total = count_parameters(model)
    return TunerModelStatus(
        base_model_type="other" if injected and not hasattr(base, "config") else type(base).__name__,
        adapter_model_type="None" if injected else type(model.base_model).__name__,
        peft_types={} if injected else {name: config.peft_type for name, config in attached.own_configs().items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agree(layer.enabled for layer in layers),
        active_adapters=_agree(layer.active_adapters for layer in layers),
        merged_adapters=_merged(layers),
        requires_grad={
            name: _agree(layer.requires_grad[name] for layer in layers if name in layer.requires_grad) for name in names
        },
        available_adapters=names,
        devices={name: sorted({d for layer in layers for d in layer.devices.get(name, [])}) for name in names},
        quantization_backend=_agree(layer.quantization_backend for layer in layers),
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


def _attached(model: nn.Module, asked: str) -> Attached:
    attached = attached_to(user_model(model))
    if attached is not None and len(attached.prompts):
        raise TypeError(
            f"{asked}() got an invalid PeftModel instance; prefix tuning and adaption prompt are not supported."
        )
    if attached is None or next(attached.named_parts(), None) is None:
        raise InputError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters "
            "injected in the model."
        )
    return attached
