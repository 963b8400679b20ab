"""Bases whose linear layers are stored in 4 or 8 bits, by bitsandbytes: how they are asked for, and made fit to train.

bitsandbytes is imported only where a recipe asks for it.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch  # noqa: TID253
from torch import nn  # noqa: TID253

from peftcli.adapters.helpers import prepare_model_for_kbit_training
from peftcli.adapters.quantized import is_quantized, keep_layout
from peftcli.errors import InputError, InputErrors, printable

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from peftcli.adapters.base_facts import BaseFacts
    from peftcli.recipe.schema import QuantizationSection

BLOCK = 64
"""Weights that share a scale in 4 bits (bitsandbytes' default)."""

SCALE_BLOCK = 256
"""Scales that share one of their own where they are quantised too."""

INSTALL = "pip install 'peftcli[quantization]'"


def require_bitsandbytes(field: str, otherwise: str) -> None:
    """Refuse what needs bitsandbytes where it is not installed; keep it quiet where it is.

    Args:
        field: the recipe's field that asks for it.
        otherwise: what to do instead of installing it.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "needs the package bitsandbytes, which is not installed", field=field, fix=f"{INSTALL}, or {otherwise}"
        )
    # At import it asks for a package it does not need; LLM.int8 says at every call that its inputs become float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def check_quantization(section: QuantizationSection | None, facts: BaseFacts) -> None:
    """Refuse what can't be quantised as asked, before any weight is read.

    Raises:
        InputErrors: bitsandbytes is missing, or the base is stored quantised in another way than the recipe says.
    """
    stored = facts.config.get("quantization_config")
    if section is None and stored is None:
        return
    require_bitsandbytes("quantization", "use a base that is not quantised and leave the section out")
    if section is not None and stored is not None and (problems := list(_contradictions(section, stored, facts))):
        raise InputErrors(problems)


def quantization_config(section: QuantizationSection, model: PreTrainedModel) -> BitsAndBytesConfig:
    """What transformers needs to quantise while loading.

    Args:
        section: the recipe's.
        model: the unquantised base on the meta device.

    Raises:
        InputErrors: naming each layer that doesn't fit into the storage type.
    """
    from transformers import BitsAndBytesConfig

    values = section.model_dump()
    if section.llm_int8_skip_modules is not None:  # a list of one's own would replace transformers' default, the heads
        values["llm_int8_skip_modules"] = [*section.llm_int8_skip_modules, *_heads(model)]
    # Two codes are a byte; a storage type holds whole numbers of them. Bytes are filled up.
    unit = 2 * getattr(torch, section.bnb_4bit_quant_storage).itemsize
    odd = [
        InputError(
            f"its {layer.out_features} x {layer.in_features} weights don't fill whole "
            f"{section.bnb_4bit_quant_storage} values",
            place=name,
            field="quantization.bnb_4bit_quant_storage",
            fix="uint8 holds every size; or name the module in llm_int8_skip_modules",
        )
        for name, layer in _to_quantize(section, model)
        if layer.weight.numel() % unit
    ]
    if section.load_in_4bit and unit > 2 and odd:
        raise InputErrors(odd)
    return BitsAndBytesConfig(**values)


def quantized_bytes(section: QuantizationSection, model: PreTrainedModel) -> tuple[int, int]:
    """What quantising a base saves, and what it costs, for the memory plan. From the layout of bitsandbytes' tensors.

    Args:
        section: the recipe's.
        model: the base without weights.

    Returns:
        Bytes that the codes, scales and tables take less than the weights; bytes of the largest weight when it is
        expanded for a multiplication.
    """
    saved = expanded = 0
    item = getattr(torch, section.bnb_4bit_compute_dtype if section.load_in_4bit else "float16").itemsize
    for _, layer in _to_quantize(section, model):
        numel = layer.weight.numel()
        saved += layer.weight.nbytes - _stored_bytes(section, numel, layer.out_features)
        expanded = max(expanded, numel * item)
    return saved, expanded


def _stored_bytes(section: QuantizationSection, numel: int, rows: int) -> int:
    """Bytes of a quantised weight of `numel` values in `rows` rows."""
    if section.load_in_8bit:
        return numel + 4 * rows  # one float32 scale a row
    blocks = -(-numel // BLOCK)
    table = 16 * 4
    if not section.bnb_4bit_use_double_quant:
        return -(-numel // 2) + 4 * blocks + table
    return -(-numel // 2) + blocks + 4 * -(-blocks // SCALE_BLOCK) + table + 256 * 4


def prepare(model: nn.Module) -> None:
    """Make a base that has quantised layers fit to train on; any other is left as it is."""
    layers = [module for module in model.modules() if is_quantized(module)]
    if not layers:
        return
    for layer in layers:
        keep_layout(layer)
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _contradictions(section: QuantizationSection, stored: dict[str, Any], facts: BaseFacts) -> Iterator[InputError]:
    """What the recipe says and the checkpoint's own quantisation doesn't."""
    from transformers import BitsAndBytesConfig

    values = BitsAndBytesConfig.from_dict(stored).to_dict()
    described = "bnb_4bit_" if section.load_in_4bit else "llm_int8_threshold"
    for field, asked in section:
        if not field.startswith(("load_in_", described)):
            continue
        if asked != values.get(field):
            yield InputError(
                f"is {printable(repr(asked))}, but the base is stored quantised with {printable(repr(values.get(field)))}",
                place=facts.folder,
                field=f"quantization.{field}",
                fix="leave the section out, or use the base that is not quantised",
            )


def _to_quantize(section: QuantizationSection, model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Path and module of every linear layer that will be quantised."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = [*(section.llm_int8_skip_modules or []), *_heads(model)]
    for name, module in model.named_modules():
        if type(module) is nn.Linear and should_convert_module(name, skipped):
            yield name, module


def _heads(model: PreTrainedModel) -> list[str]:
    """Paths of the modules transformers leaves unquantised: embeddings, what is tied to them, and the last module."""
    kept = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    last = list(dict(model.named_parameters()))[-1].rpartition(".")[0]
    return [name for name, module in model.named_modules() if id(module) in kept or name == last]
