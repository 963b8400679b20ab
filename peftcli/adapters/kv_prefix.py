"""Prefixes of keys and values taken from real text instead of chance, and several of them end to end (cartridges)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253

from peftcli.adapters import checkpoint, kv_cache
from peftcli.adapters.config import CONFIG_NAME, read_config
from peftcli.adapters.methods.cartridge import CartridgeConfig
from peftcli.adapters.model import PeftModel
from peftcli.adapters.state import set_peft_model_state_dict
from peftcli.errors import InputError

KEY = "prompt_embeddings"


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first tokens of a cache as a prompt [tokens, 2 * layers * width of the keys], as an adapter's file has it.

    Args:
        past_key_values: what the bare model returned for one text.
        num_virtual_tokens: how many tokens to take.

    Raises:
        InputError: if the cache holds fewer, or several texts.
    """
    pairs = [(layer.keys, layer.values) for layer in past_key_values.layers]
    rows, _, tokens, _ = pairs[0][0].shape
    if rows != 1:
        raise InputError(f"holds {rows} texts", field="past_key_values", allowed="one")
    if tokens < num_virtual_tokens:
        raise InputError(
            f"is {num_virtual_tokens}, but the text has only {tokens} tokens",
            field="num_virtual_tokens",
            fix="a longer text",
        )
    states = torch.stack([states[0, :, :num_virtual_tokens] for pair in pairs for states in pair])
    return states.permute(2, 0, 1, 3).flatten(1)  # from [2 layers, heads, tokens, head_dim]


def initialize_kv_prefix_from_past_key_values(
    model: PeftModel, *, past_key_values: Any, adapter_name: str | None = None, num_virtual_tokens: int | None = None
) -> Tensor:
    """Let a prefix or cartridge begin as the first tokens of a cache, which is returned as `prompt_embeddings`."""
    name = adapter_name or model.active_adapter
    config = model.peft_config[name]
    if config.peft_type not in ("CARTRIDGE", "PREFIX_TUNING"):
        raise InputError(f"is {config.peft_type}", field=name, allowed="CARTRIDGE, PREFIX_TUNING")
    tokens = num_virtual_tokens or config.num_virtual_tokens  # type: ignore[attr-defined]
    prompt = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=tokens)
    set_peft_model_state_dict(model, {KEY: prompt}, name)
    return prompt


def initialize_kv_prefix_from_text(
    model: PeftModel,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Let a prefix or cartridge begin as what the bare model keeps of a text's first tokens.

    Args:
        model: a PeftModel.
        tokenizer: the base's.
        text: at least `num_virtual_tokens` long.
        adapter_name: which adapter; the active one by default.
        num_virtual_tokens: how many tokens to take; the adapter's own number by default.
        use_chat_template: put the text into a system message, where the tokenizer has a chat template.
        max_length: read no more tokens than that.
    """
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        message = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(message, tokenize=True, return_dict=False, return_tensors="pt")
    else:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    ids = ids[:, :max_length].to(next(model.parameters()).device)
    with model.disable_adapter(), torch.no_grad():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    return initialize_kv_prefix_from_past_key_values(
        model,
        past_key_values=kv_cache.given(output),
        adapter_name=adapter_name,
        num_virtual_tokens=num_virtual_tokens,
    )


def compose_cartridge_adapters(adapter_paths: Sequence[str | Path], *, output_path: str | Path) -> None:
    """Write the cartridge that several saved ones are end to end, in the order named.

    Raises:
        InputError: for other adapters, or cartridges of models of another shape.
    """
    if len(adapter_paths) < 2:
        raise InputError(f"has {len(adapter_paths)}", field="adapter_paths", allowed="two cartridges or more")
    folders = [checkpoint.resolve_adapter_folder(path) for path in adapter_paths]
    configs = [read_config(folder / CONFIG_NAME) for folder in folders]
    first = configs[0]
    for folder, config in zip(folders, configs, strict=True):
        if not isinstance(config, CartridgeConfig):
            raise InputError(f"is {config.peft_type}", place=folder, allowed="CARTRIDGE")
        for field in ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
            if getattr(config, field) != getattr(first, field):
                raise InputError(
                    f"is {getattr(config, field)}, but {getattr(first, field)} in {folders[0]}",
                    place=folder,
                    field=field,
                )
    assert isinstance(first, CartridgeConfig)
    prompt = torch.cat([checkpoint.read_tensors(folder)[KEY] for folder in folders])
    checkpoint.write_weights(Path(output_path), {KEY: prompt})
    replace(first, num_virtual_tokens=len(prompt)).save_pretrained(output_path)
