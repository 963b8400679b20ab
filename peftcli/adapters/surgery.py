"""Layer replication: a deeper model out of a base's own layers, whose weights are shared (used by "frankenmerges").

`[[0, 4], [2, 5]]` builds the layers 0 1 2 3 2 3 4. Repeated layers share the base's weights; only their adapters differ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn  # noqa: TID253

from peftcli.errors import InputError

MAX_LAYERS = 1024  # deeper than any model there is; a file that asks for more is broken or hostile
LIST_NAMES = ("layers", "layer", "h")
"""What transformers calls the list of a model's layers (llama and mistral, bert, falcon)."""


def replicate_layers(model: nn.Module, ranges: Sequence[Sequence[int]]) -> Callable[[], None]:
    """Rebuild the list of layers in place, and tell the model's config how many there are now.

    Args:
        model: a transformers model.
        ranges: (first, end) pairs, end not included.

    Returns:
        What brings the model's own list of layers back.

    Raises:
        InputError: if the model has no list of layers, or a range lies outside it.
    """
    owner, name = _layer_list(model)
    layers: Any = getattr(owner, name)
    for start, end in ranges:
        if not 0 <= start < end <= len(layers):
            raise InputError(
                f"the range [{start}, {end}] does not lie in the model's {len(layers)} layers",
                field="layer_replication",
                allowed=f"0 <= start < end <= {len(layers)}",
            )
    order = [index for start, end in ranges for index in range(start, end)]
    if len(order) > MAX_LAYERS:
        raise InputError(f"builds {len(order)} layers; more than {MAX_LAYERS} are refused", field="layer_replication")
    config: Any = getattr(model, "config", None)
    before = copy.deepcopy(config)
    seen: set[int] = set()
    rebuilt = nn.ModuleList()
    for position, index in enumerate(order):
        layer = twin_of(layers[index]) if index in seen else layers[index]
        seen.add(index)
        _number(layer, position)
        rebuilt.append(layer)
    setattr(owner, name, rebuilt)
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = len(order)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[index] for index in order]

    def undo() -> None:
        setattr(owner, name, layers)
        for index, layer in enumerate(layers):
            _number(layer, index)
        if config is not None:
            config.__dict__.update(before.__dict__)

    return undo


def _number(layer: nn.Module, position: int) -> None:
    """Tell a layer where it stands: the key of its entry in the key-value cache."""
    for module in layer.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = position  # type: ignore[assignment]


def twin_of(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are the original's own."""
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, memo={id(tensor): tensor for tensor in shared})


def _layer_list(model: nn.Module) -> tuple[nn.Module, str]:
    inner: Any = getattr(model, "base_model", model)
    for owner in (inner, getattr(inner, "encoder", None), getattr(inner, "decoder", None)):
        for name in LIST_NAMES:
            if isinstance(owner, nn.Module) and isinstance(getattr(owner, name, None), nn.ModuleList):
                return owner, name
    raise InputError(f"{type(model).__name__} has no list of layers to replicate", field="layer_replication")
