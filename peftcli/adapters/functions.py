"""What PEFT offers as functions for models that are no PeftModel, or become one."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters.attach import Placement, attach
from peftcli.adapters.checkpoint import PREFIX
from peftcli.adapters.config import PeftConfig, as_tuner_config, require_config
from peftcli.adapters.engine import adapters_of, attached_to, base_modules
from peftcli.adapters.model import PeftModel
from peftcli.adapters.task_models import model_class
from peftcli.errors import InputError


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
    require_config(peft_config)
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
            warnings.warn(
                f"peft config has already set base model revision to {peft_config.revision}, "
                f"overwriting with revision {revision}",
                stacklevel=2,
            )
        peft_config.revision = revision
    if mixed:
        from peftcli.adapters.mixed import PeftMixedModel

        kind: type[PeftModel] = PeftMixedModel
    else:
        kind = model_class(peft_config)
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Attach an adapter without wrapping the model in a PeftModel.

    Args:
        peft_config: the adapter's config.
        model: any module; changed in place.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: accepted; attaching never takes more.
        state_dict: the tensors it will be loaded from: the modules they belong to become its `target_modules`.
    """
    require_config(peft_config)
    if state_dict is not None:
        peft_config = replace(as_tuner_config(peft_config), target_modules=_modules_of(state_dict, model))
    attached = attach(model, peft_config, adapter_name)
    attached.set_active([adapter_name], trainable=not peft_config.inference_mode)  # the last one injected, as in PEFT
    return model


def _modules_of(state_dict: Iterable[str], model: nn.Module) -> set[str]:
    """The modules of a model that tensors are named after."""
    paths, found = {path for path, _ in base_modules(model)}, set()
    for key in state_dict:
        path = key.removeprefix(PREFIX)
        while path not in paths:
            path = path.rpartition(".")[0]
        found.add(path)
    if "" in found:
        raise InputError("holds tensors of no module of this model", place="state_dict")
    return found


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type | None = None,
) -> None:
    """Make adapters of a model the active ones; their tensors get gradients, unless `inference_mode`.

    `layer_cls` is PEFT's: all layers of an adapter are switched.
    """
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    adapters_of(model).set_active(names, trainable=not inference_mode)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: type | None = None) -> None:
    """Remove an adapter from a model without a trace. `prefix` and `layer_cls` are PEFT's; an adapter's name is enough."""
    adapters_of(model).delete(adapter_name)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Train adapters of a model, or no longer; which ones are active stays."""
    for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
        adapters_of(model).set_requires_grad(name, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """An adapter's half-precision tensors to float32, unless `autocast_adapter_dtype` is False."""
    for parameter in adapters_of(model).parameters_of(adapter_name):
        parameter.data = parameter.data.to(Placement(autocast_adapter_dtype).dtype(parameter.dtype))
