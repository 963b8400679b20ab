"""Hot swap: put another adapter's weights in the place of a loaded one, so that a compiled model is not compiled again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch  # noqa: TID253
from torch import nn  # noqa: TID253

from peftcli.adapters import checkpoint
from peftcli.adapters.config import PeftConfig, read_config
from peftcli.adapters.engine import adapters_of
from peftcli.adapters.methods.lora import Lora, LoraConfig
from peftcli.adapters.methods.lora_variants import VARIANTS
from peftcli.errors import InputError


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | None = None,
    *,
    allow_pickle: bool = False,
    **hub: Any,
) -> None:
    """Replace the weights of a loaded LoRA adapter by a saved one's, in place: see `hotswap_adapter_from_state_dict`.

    Args:
        model: the PeftModel.
        model_name_or_path: the saved adapter.
        adapter_name: the loaded adapter whose place it takes.
        torch_device: accepted: tensors go where the loaded adapter's are.
        allow_pickle: read a `.bin` file.
    """
    folder = checkpoint.resolve_adapter_folder(model_name_or_path, **hub)
    config = read_config(folder / checkpoint.CONFIG_NAME)
    tensors = checkpoint.read_tensors(folder, allow_pickle=allow_pickle)
    hotswap_adapter_from_state_dict(model, tensors, adapter_name, config, place=folder)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: PeftConfig,
    *,
    place: str | Path = "state dict",
) -> None:
    """Replace the weights of a loaded LoRA adapter, in place.

    A smaller rank is padded with zeros; the scaling follows the new adapter. Modules the new adapter does not have get
    zeros.

    Args:
        model: the PeftModel.
        state_dict: the new tensors, by their key in a file.
        adapter_name: the loaded adapter whose place they take.
        config: the new adapter's.
        place: where they are from, for messages.

    Raises:
        InputError: for another method, DoRA or biases, a larger rank, or modules the loaded adapter does not have; the
            loaded adapter is then unchanged.
    """
    attached = adapters_of(model)
    new, old = config, attached.configs.get(adapter_name)
    if not (isinstance(new, LoraConfig) and isinstance(old, LoraConfig)):
        raise InputError("Hotswapping only works for LoRA adapters", place=place)
    for field in ("bias", "lora_bias", *VARIANTS):
        if getattr(new, field) != getattr(old, field) or getattr(new, field) not in (False, None, "none"):
            raise InputError("Hotswapping works only for plain LoRA without biases", place=place, field=field)
    owned = checkpoint.owned_tensors(attached, adapter_name)
    if unknown := sorted(set(state_dict) - set(owned)):
        raise InputError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unknown[:5])}", place=place
        )
    for key, tensor in state_dict.items():
        if not _fits(tensor, owned[key]):
            raise InputError(
                f"has the shape {list(tensor.shape)}, the loaded adapter only {list(owned[key].shape)}",
                place=place,
                field=key,
                fix="load the adapter of the largest rank first, or prepare_model_for_compiled_hotswap(target_rank=...)",
            )
    with torch.no_grad():
        for key, held in owned.items():
            held.zero_()
            if key in state_dict:
                held[tuple(slice(size) for size in state_dict[key].shape)] = state_dict[key].to(held)
    for _, layer in attached.layers():
        if adapter_name in layer.adapters:
            _rescale(cast(Lora, layer.adapters[adapter_name]), new)
    attached.configs[adapter_name] = new


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make room for adapters up to a rank, and let scalings change without recompiling. Call before `torch.compile`.

    Args:
        model: a PeftModel with LoRA adapters.
        target_rank: pad A and B with zeros to this rank; None leaves them.
        config: accepted: adapters know their own.
        check_compiled: what to do about a model that is compiled already.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise InputError(f"is {check_compiled!r}", field="check_compiled", allowed="error, warn, ignore")
    if hasattr(model, "_orig_mod") and check_compiled != "ignore":
        problem = "Call prepare_model_for_compiled_hotswap *before* compiling the model"
        if check_compiled == "error":
            raise InputError(problem)
        warnings.warn(problem, stacklevel=2)
    for _, layer in adapters_of(model).layers():
        for name, adapter in layer.adapters.items():
            if target_rank is not None:
                _pad(layer, name, target_rank)
            adapter.scaling = torch.tensor(float(adapter.scaling), device=layer.site.device)  # type: ignore[assignment]


def _pad(layer: Any, name: str, rank: int) -> None:
    for slot, tensor in list(layer.own_tensors(name)):
        axis = 0 if slot.head.endswith("_A") else 1
        if tensor.shape[axis] > rank:
            raise InputError(f"target_rank {rank} is smaller than rank {tensor.shape[axis]}", place=layer.site.name)
        shape = list(tensor.shape)
        shape[axis] = rank
        padded = tensor.new_zeros(shape)
        padded[tuple(slice(size) for size in tensor.shape)] = tensor.detach()
        tensor.data = padded


def _fits(new: torch.Tensor, held: torch.Tensor) -> bool:
    return new.dim() == held.dim() and all(a <= b for a, b in zip(new.shape, held.shape, strict=True))


def _rescale(adapter: Lora, config: LoraConfig) -> None:
    """The scaling the adapter had if it were loaded afresh; a tensor scaling is changed in place."""
    scaling = Lora(config, adapter.shape).initial_scaling()
    if isinstance(adapter.scaling, torch.Tensor):
        adapter.scaling.fill_(scaling)
    else:
        adapter.scaling = scaling
    adapter.config = config
