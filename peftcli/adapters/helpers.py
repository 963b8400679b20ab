"""Small helpers PEFT's documentation uses around its models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters import checkpoint
from peftcli.adapters.config import PeftConfig, read_config
from peftcli.adapters.layer import AdapterLayer
from peftcli.adapters.loading import map_keys
from peftcli.errors import InputError


def check_if_peft_model(model_name_or_path: str | Path) -> bool:
    """Whether there is an adapter at this path or hub id."""
    try:
        read_config(checkpoint.resolve_adapter_folder(model_name_or_path) / checkpoint.CONFIG_NAME)
    except InputError:
        return False
    return True


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """A config from a dictionary that names its `peft_type`."""
    from peftcli.adapters.config import build_config
    from peftcli.adapters.registry import config_class

    return build_config(config_class(str(config_dict.get("peft_type"))), config_dict, place="config")


def load_peft_weights(
    model_id: str | Path,
    device: str | None = None,
    key_mapping: dict[str, str] | None = None,
    *,
    allow_pickle: bool = False,
    **hub: Any,
) -> dict[str, Tensor]:
    """The tensors of a saved adapter by their key in the file, which `key_mapping` may rename (see `loading.map_keys`)."""
    folder = checkpoint.resolve_adapter_folder(model_id, **hub)
    tensors = map_keys(checkpoint.read_tensors(folder, allow_pickle=allow_pickle), key_mapping)
    return {key: tensor.to(device) for key, tensor in tensors.items()} if device else tensors


def infer_device() -> str:
    """The kind of device this machine computes on."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator else "cpu"


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The weight [out, in] of a layer that may store it as [in, out]."""
    return weight.T if fan_in_fan_out else weight


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The parent of the module at a path, the module, and its name there."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """All adapters of the model act `multiplier` times as strongly inside the `with`.

    Raises:
        TypeError: if the multiplier is not a number.
        ValueError: if the model has no adapted layers.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    if not layers:
        raise InputError("scaling is only supported for models with `LoraLayer`s")
    before = [(adapter, adapter.scaling) for layer in layers for adapter in layer.adapters.values()]
    try:
        for adapter, scaling in before:
            adapter.scaling = scaling * multiplier
        yield
    finally:
        for adapter, scaling in before:
            adapter.scaling = scaling


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """What is trained to float32, everything else to `dtype`: the fix for "Attempting to unscale FP16 gradients"."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a quantised model and make it stable to train through.

    Half-precision norms go to float32; what they give goes back to the precision of what they got, since one float32
    activation would turn all that follow to float32. The output head stays as it is for the same reason: its logits are
    the largest tensor of a step.

    Args:
        model: a model loaded in 8 or 4 bit.
        use_gradient_checkpointing: recompute activations in the backward pass.
        gradient_checkpointing_kwargs: for transformers; `use_reentrant` defaults to False.
        auto_clear_cache: accepted: nothing is left behind that would have to be cleared.
    """
    model.requires_grad_(False)
    module: Any
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":  # keeps no trace of the precision its weight had
            module.compute_dtype = getattr(model, "dtype", None)
        own = list(module.parameters(recurse=False))
        # Biases are left alone: kernels want them in the precision of their weight.
        if own and all(p.dim() == 1 and p.is_floating_point() for p in own):
            for parameter in own:
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            module.register_forward_hook(_in_precision_of_input)
    if use_gradient_checkpointing:
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        transformer: Any = model
        if options["use_reentrant"]:
            transformer.enable_input_require_grads()
        # transformers 5 renamed it and warns about the old name
        enable = getattr(model, "activation_checkpointing_enable", None) or transformer.gradient_checkpointing_enable
        enable(options)
    return model


def _in_precision_of_input(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(inputs[0].dtype)


def shift_tokens_right(input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> Tensor:
    """Decoder inputs [B, T] from labels [B, T]: one to the right, a start token in front, ignored labels padded."""
    if pad_token_id is None:
        raise InputError("self.model.config.pad_token_id has to be defined.")
    shifted = input_ids.roll(1, dims=-1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)
