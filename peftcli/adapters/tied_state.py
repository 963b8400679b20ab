"""A state dict in which a tensor that several modules share stands once, under its first name, and loads from there.

safetensors refuses a tensor under two names, and with it `transformers.Trainer`, which saves the state of a model that is
no `PreTrainedModel` as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn  # noqa: TID253


def keep_tied_once(module: nn.Module) -> None:
    """Let a module's state dict hold shared tensors once from now on."""
    module.register_state_dict_post_hook(_without_repeats)
    module.register_load_state_dict_pre_hook(_with_repeats)


def _repeats(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, first name) of every parameter that already has another name."""
    first: dict[nn.Parameter, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if (known := first.setdefault(parameter, name)) != name:
            yield name, known


def _without_repeats(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for name, _ in _repeats(module):
        state.pop(prefix + name, None)


def _with_repeats(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, first in _repeats(module):
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])
