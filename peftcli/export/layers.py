"""Layer replication written out: a checkpoint's tensors under the names they have in the deeper model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from peftcli.adapters.base_facts import BaseFacts
from peftcli.adapters.header import TensorInfo
from peftcli.errors import InputError

MAX_LAYERS = 1024  # as in `adapters.surgery`
LAYER = re.compile(r"((?:.+\.)?(?:layers|layer|h)\.)(\d+)(\..+)")
"""A tensor in a model's list of layers: what comes before its number, the number, and the rest."""


def common_replication(configs: Sequence[Any]) -> list[list[int]] | None:
    """The layers all adapters replicate; None where none does.

    Raises:
        InputError: if they differ.
    """
    found = [getattr(config, "layer_replication", None) for config in configs]
    if any(item != found[0] for item in found):
        raise InputError("the adapters replicate different layers", field="layer_replication")
    return found[0]


def layer_order(replication: Sequence[Sequence[int]], count: int) -> list[int]:
    """Which of the base's `count` layers each layer of the deeper model is.

    Raises:
        InputError: for a range outside the model, or too many layers.
    """
    for start, end in replication:
        if not 0 <= start < end <= count:
            raise InputError(
                f"the range [{start}, {end}] does not lie in the model's {count} layers", field="layer_replication"
            )
    order = [index for start, end in replication for index in range(start, end)]
    if len(order) > MAX_LAYERS:
        raise InputError(f"builds {len(order)} layers; more than {MAX_LAYERS} are refused", field="layer_replication")
    return order


def replicated_names(facts: BaseFacts, replication: Sequence[Sequence[int]] | None) -> dict[str, TensorInfo]:
    """Each tensor of the result and the base's tensor it is; without replication the base's own names."""
    if not replication:
        return dict(facts.tensors)
    found = {name: LAYER.fullmatch(name) for name in facts.tensors}
    numbers = [int(match[2]) for match in found.values() if match]
    if not numbers:
        raise InputError("has no list of layers to replicate", place=facts.folder, field="layer_replication")
    order = layer_order(replication, max(numbers) + 1)
    names: dict[str, TensorInfo] = {name: info for name, info in facts.tensors.items() if not found[name]}
    for position, index in enumerate(order):
        for name, match in found.items():
            if match and int(match[2]) == index:
                names[f"{match[1]}{position}{match[3]}"] = facts.tensors[name]
    return names


def replicated_config(
    config: dict[str, Any], replication: Sequence[Sequence[int]] | None, count: int
) -> dict[str, Any]:
    """A model's config with as many layers as there are now."""
    if not replication:
        return config
    order = layer_order(replication, count)
    changed = {**config, "num_hidden_layers": len(order)}
    if isinstance(config.get("layer_types"), list):
        changed["layer_types"] = [config["layer_types"][index] for index in order]
    return changed
