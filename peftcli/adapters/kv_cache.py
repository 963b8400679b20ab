"""What a model calls its key-value cache: `past_key_values` in transformers before 5.24, `cache` from there on.

Newer models still take the old name, with a warning; code of a model that isn't part of transformers may know only one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

NAMES = ("cache", "past_key_values")
"""Newest first: asked for the old name, new outputs warn."""


def argument_of(module: nn.Module) -> str | None:
    """What `module.forward` calls its cache; None where it takes none."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in NAMES if name in parameters), None)


def given(values: Mapping[str, Any]) -> Any:
    """The cache among a model's inputs or outputs, under either name, or None."""
    return next((values[name] for name in NAMES if values.get(name) is not None), None)


def without(values: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs or outputs but the cache."""
    return {name: value for name, value in values.items() if name not in NAMES}


def is_filled(cache: Any) -> bool:
    """Whether a cache holds anything."""
    return cache is not None and cache.get_seq_length() > 0
