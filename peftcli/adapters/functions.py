"""What PEFT offers as functions: wrapping a model, and one adapter's tensors in and out of it."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters import checkpoint
from peftcli.adapters.attach import attach
from peftcli.adapters.config import PeftConfig
from peftcli.adapters.engine import adapters_of, attached_to
from peftcli.adapters.model import PeftModel
from peftcli.adapters.task_models import model_class


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A model with a fresh adapter. The model is changed in place.

    Args:
        model: any module; a transformers model for `all-linear`, task types and default targets.
        peft_config: the adapter's config.
        adapter_name: the adapter's name.
        mixed: adapters of different methods together.
        autocast_adapter_dtype: keep adapters of half-precision models in fp32.
        revision: the base's revision, recorded in the config.

    Raises:
        InputError: if the config does not fit the model.
    """
    if attached_to(model) is not None or isinstance(model, PeftModel):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before.",
            stacklevel=2,
        )
    name = getattr(getattr(model, "config", None), "name_or_path", None) or getattr(model, "name_or_path", None)
    if name and peft_config.base_model_name_or_path not in (None, name):
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{peft_config.base_model_name_or_path}' to "
            f"'{name}'. Please ensure that the correct base model is loaded when loading this checkpoint.",
            stacklevel=2,
        )
    peft_config.base_model_name_or_path = name or peft_config.base_model_name_or_path
    if revision is not None:
        if peft_config.revision not in (None, revision):
            warnings.warn(f"peft config has already set base model revision to {peft_config.revision}", stacklevel=2)
        peft_config.revision = revision
    if mixed:
        from peftcli.adapters.mixed import PeftMixedModel

        kind: type[PeftModel] = PeftMixedModel
    else:
        kind = model_class(peft_config)
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter, keyed as its file keys them.

    Args:
        model: a PeftModel, or a model an adapter was injected into.
        state_dict: values by the model's own names, where they were gathered from several processes.
        adapter_name: the adapter.
        unwrap_compiled: the model is what `torch.compile` returned.
        save_embedding_layers: also the base's embeddings: True, False, or `auto`: if tokens were added.
    """
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    attached = adapters_of(model)
    if state_dict is None:
        return checkpoint.adapter_state_dict(attached, adapter_name, save_embedding_layers=save_embedding_layers)
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    owned = checkpoint.owned_tensors(attached, adapter_name)
    return {key: state_dict[names[id(tensor)]] for key, tensor in sorted(owned.items())}


class LoadResult(NamedTuple):
    """What `set_peft_model_state_dict` left out: nothing, or it would have raised."""

    missing_keys: list[str]
    unexpected_keys: list[str]


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
        peft_model_state_dict: tensors by the file's keys.
        adapter_name: the adapter.
        ignore_mismatched_sizes: leave tensors of another shape out, with a warning.
        low_cpu_mem_usage: accepted; loading never takes more.

    Raises:
        InputErrors: listing every missing, unexpected and mis-shaped tensor.
    """
    attached = adapters_of(model)
    given = dict(peft_model_state_dict)
    if ignore_mismatched_sizes:
        owned = checkpoint.owned_tensors(attached, adapter_name)
        for key in [key for key, tensor in given.items() if key in owned and owned[key].shape != tensor.shape]:
            warnings.warn(f"{key} has another shape and is left as it is", stacklevel=2)
            given[key] = owned[key].detach().clone()
    checkpoint.load_state(attached, adapter_name, given)
    return LoadResult([], [])


def inject_adapter_in_model(
    peft_config: PeftConfig, model: nn.Module, adapter_name: str = "default", low_cpu_mem_usage: bool = False
) -> nn.Module:
    """Attach an adapter without wrapping the model in a PeftModel."""
    attach(model, peft_config, adapter_name)
    return model
