"""A saved adapter, opened for a base: its config as it is to be used here, and its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor  # noqa: TID253

from peftcli.adapters import checkpoint
from peftcli.adapters.config import PeftConfig, read_config, require_config
from peftcli.adapters.fingerprint import check_fingerprint
from peftcli.errors import InputError


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's folder and what is in it."""

    folder: Path
    config: PeftConfig
    tensors: dict[str, Tensor]


def open_adapter(
    model_id: str | Path,
    base: dict[str, Any] | None,
    *,
    config: PeftConfig | None = None,
    is_trainable: bool = False,
    allow_pickle: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    hub: dict[str, Any],
) -> SavedAdapter:
    """Read a saved adapter.

    Args:
        model_id: a folder, or a hub id.
        base: the fingerprint of the model it is for.
        config: used instead of the saved one.
        is_trainable: whether it is to be trained on.
        allow_pickle: read a `.bin` file.
        key_mapping: see `map_keys`.
        hub: where on the hub it is, and X-LoRA's experts as `adapters`.

    Raises:
        InputError: there is no adapter, it is damaged, or was trained on another base.
    """
    if config is not None:
        require_config(config)
    experts = hub.pop("adapters", None)  # X-LoRA's
    folder = checkpoint.resolve_adapter_folder(model_id, **hub)
    config = config or read_config(folder / checkpoint.CONFIG_NAME)
    if config.is_prompt_learning and is_trainable:
        raise InputError("Cannot set a prompt learning adapter to trainable when loading pretrained adapter.")
    config.inference_mode = not is_trainable
    config.locate(folder, experts)
    check_fingerprint(folder, base)
    tensors = map_keys(checkpoint.read_tensors(folder, allow_pickle=allow_pickle), key_mapping)
    config.follow_file({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    return SavedAdapter(folder, config, tensors)


def map_keys(tensors: dict[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Tensors with the modules in their keys renamed, for a base whose modules were: regular expression -> replacement.

    Expressions see keys without `base_model.model.`; the first that matches a key is applied to it.
    """
    if not key_mapping:
        return tensors
    return {_mapped(key, key_mapping): tensor for key, tensor in tensors.items()}


def _mapped(key: str, key_mapping: Mapping[str, str]) -> str:
    prefix = next((p for p in (checkpoint.PREFIX, "base_model.") if key.startswith(p)), "")
    inside = key.removeprefix(prefix)
    for pattern, replacement in key_mapping.items():
        renamed, times = re.subn(pattern, replacement, inside)
        if times:
            return prefix + renamed
    return key
