"""Base models of any architecture we know as GGUF files, written with the `gguf` package as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training.tiny import VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM

gguf = pytest.importorskip("gguf")

BASES: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in ("llama", "mistral", "qwen2", "olmo2", "phi3")},
    "qwen3": {"head_dim": 8},
    "smollm3": {"num_hidden_layers": 4},  # the fourth does not rotate
    "granite": {
        **{"embedding_multiplier": 2.0, "attention_multiplier": 0.25},
        **{"residual_multiplier": 0.5, "logits_scaling": 2.0},
    },
    "gemma": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 8, "num_hidden_layers": 7},
}
"""Every model_type we write adapters for, and what a tiny one needs; of Gemma 3 the sixth layer looks at everything."""

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGED = "AB"

LLAMA_ORDER = ("llama", "mistral", "smollm3", "granite")
"""model_types whose rows of q and k change places for llama.cpp's way of rotating."""


def save_base(folder: Path, kind: str) -> Path:
    """A random base of any kind, as a model's folder; norms and biases are random, too."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    config = AutoConfig.for_model(kind, **{**sizes, **heads, **ends, "initializer_range": 0.3, **BASES[kind]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def linear_modules(kind: str) -> list[str]:
    """The names of a base's linear layers, and of its embedding and head where they are two."""
    up = ["gate_up_proj"] if kind == "phi3" else ["gate_proj", "up_proj"]
    attention = ["qkv_proj"] if kind == "phi3" else ["q_proj", "k_proj", "v_proj"]
    ends = [] if BASES[kind].get("tie_word_embeddings") else ["embed_tokens", "lm_head"]
    return [*attention, "o_proj", *up, "down_proj", *ends]


def tokens(count: int) -> list[str]:
    """A byte-level vocabulary."""
    return [*CONTROL, *(chr(33 + index) for index in range(count - len(CONTROL) - 1)), MERGED]


def write(path: Path, model: Any) -> Path:
    """A causal model as a GGUF file in float32, with a byte-level tokenizer and a chat template."""
    config = model.config
    kind = config.model_type
    architecture = {"mistral": "llama", "gemma3_text": "gemma3"}.get(kind, kind)
    writer = gguf.GGUFWriter(str(path), architecture)
    _write_sizes(writer, config)
    _write_tokenizer(writer, config)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    is_tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if is_tied and name == "lm_head.weight":
            continue
        weight = tensor.numpy()
        module = name.rpartition(".")[0].rpartition(".")[2]
        if kind in LLAMA_ORDER and module in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
            weight = permuted(weight, heads)
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + 1  # transformers adds it where it normalises
        writer.add_tensor(table.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp wants them for its way of rotating."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _write_sizes(writer: Any, config: Any) -> None:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotation = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rotation.get("full_attention", rotation)["rope_theta"])
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def _write_tokenizer(writer: Any, config: Any) -> None:
    vocabulary = tokens(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(vocabulary) - len(CONTROL)))
    writer.add_token_merges([" ".join(MERGED)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
