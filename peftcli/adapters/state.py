"""One adapter's tensors in and out of a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters import checkpoint
from peftcli.adapters.engine import Attached, adapters_of, base_modules, user_model
from peftcli.errors import InputError, InputErrors


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter, keyed as its file keys them; by plain paths where the model is no PeftModel, as in PEFT.

    Args:
        model: a PeftModel, or a model an adapter was injected into.
        state_dict: values by the model's own names, where they were gathered from several processes.
        adapter_name: the adapter.
        unwrap_compiled: the model is what `torch.compile` returned.
        save_embedding_layers: also the base's embeddings: True, False, or `auto`: if tokens were added.
    """
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    attached = adapters_of(model)
    with _values_of(model, adapter_name, state_dict) if state_dict is not None else nullcontext():
        state = checkpoint.adapter_state_dict(attached, adapter_name, save_embedding_layers=save_embedding_layers)
    prefix = checkpoint.PREFIX if user_model(model) is model else ""
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()}


@contextmanager
def _values_of(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> Iterator[None]:
    """The adapter with the values of `state_dict` inside the `with`, so that they are stored as its own would be."""
    attached = adapters_of(model)
    owned = checkpoint.owned_tensors(attached, adapter_name)
    tensors = {id(t): t for t in (*owned.values(), *checkpoint.embedding_tensors(attached).values())}
    values = {id(t): state_dict[name] for name, t in model.state_dict(keep_vars=True).items() if name in state_dict}
    if missing := [key for key, tensor in owned.items() if id(tensor) not in values]:
        raise InputErrors(InputError("is missing", place="state_dict", field=key) for key in missing)
    before = {key: tensor.data for key, tensor in tensors.items()}
    try:
        for key, tensor in tensors.items():
            if key in values:
                tensor.data = values[key].to(tensor.device)
        yield
    finally:
        for key, tensor in tensors.items():
            tensor.data = before[key]


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base's own tensors by the names they have without adapters."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in base_modules(user_model(model))
        for name, tensor in _own_state(module).items()
    }


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Load the base's own tensors by the names they have without adapters.

    Raises:
        InputErrors: listing what is missing or unexpected, if `strict`; nothing has been changed then.
    """
    owned = get_base_model_state_dict(model)
    result = LoadResult(
        [key for key in owned if key not in state_dict], [key for key in state_dict if key not in owned]
    )
    if strict and any(result):
        wrong = [("is missing", key) for key in result.missing_keys]
        wrong += [("belongs to no module of the base", key) for key in result.unexpected_keys]
        raise InputErrors(InputError(problem, place="state_dict", field=key) for problem, key in wrong)
    with torch.no_grad():
        for key in owned.keys() & state_dict.keys():
            owned[key].copy_(state_dict[key])
    return result


def _own_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and the buffers its state dict has, without those of modules inside it."""
    fleeting = module._non_persistent_buffers_set
    held = module._parameters | {name: b for name, b in module._buffers.items() if name not in fleeting}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


class LoadResult(NamedTuple):
    """What loading left out: nothing, or it would have raised."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def fitting_sizes(attached: Attached, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors, with the adapter's own where shapes differ; each is named in a warning."""
    owned = checkpoint.owned_tensors(attached, name)
    other = [key for key, tensor in tensors.items() if key in owned and owned[key].shape != tensor.shape]
    for key in other:
        warnings.warn(f"{key} has another shape and is left as it is", stacklevel=4)
    return tensors | {key: owned[key].detach().clone() for key in other}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Load a file's tensors into an adapter that is already attached.

    Args:
        model: a PeftModel, or a model an adapter was injected into.
        peft_model_state_dict: tensors by the file's keys, or by plain paths where the model is no PeftModel.
        adapter_name: the adapter.
        ignore_mismatched_sizes: leave tensors of another shape out, with a warning.
        low_cpu_mem_usage: accepted; loading never takes more.

    Raises:
        InputErrors: listing every missing, unexpected and mis-shaped tensor.
    """
    attached = adapters_of(model)
    given = dict(peft_model_state_dict)
    if user_model(model) is model:
        given = {k if k.startswith("base_model.") else checkpoint.PREFIX + k: tensor for k, tensor in given.items()}
    if ignore_mismatched_sizes:
        given = fitting_sizes(attached, adapter_name, given)
    checkpoint.load_state(attached, adapter_name, given)
    return LoadResult([], [])
