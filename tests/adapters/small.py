"""A small language model and a small network without a config, for tests of what holds for any model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

IDS = torch.arange(12).reshape(2, 6)
"""Token ids [B, T] for `llama`."""

X = torch.linspace(-1, 1, 36).reshape(3, 12)
"""Inputs [B, in] for `mlp`."""


def llama(layers: int = 1, **fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_hidden_layers": layers, **fields})).eval()


def mlp() -> nn.Sequential:
    """Two linear layers, `0` and `2`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.LayerNorm(10), nn.Linear(10, 8)).eval()
