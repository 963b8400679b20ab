"""Tiny models and data for the loop's tests, built from configs: no files, no network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

VOCABULARY = 97


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Two layers, 16 wide; float32 unless told otherwise."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides}))


def tiny_model(model_type: str, **settings: Any) -> nn.Module:
    """A tiny model of another architecture."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))


def random_batch(rows: int = 3, length: int = 11, seed: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded rows of different lengths; about half the tokens are labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    lengths = torch.randint(4, length + 1, (rows, 1), generator=generator)
    real = torch.arange(length) < lengths
    wanted = (torch.rand(rows, length, generator=generator) < 0.6) & real
    wanted[:, 0] = False
    labels = torch.where(wanted, ids, -100)
    return {"input_ids": ids * real, "attention_mask": real.long(), "labels": labels}
