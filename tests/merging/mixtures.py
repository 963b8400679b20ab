"""Tiny mixtures of experts of any kind, saved as folders."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    **{"vocab_size": 48, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "eos_token_id": 1},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_experts_per_tok": 2, "bos_token_id": 1},
}
KINDS = {
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 12},
    "deepseek_v3": {
        **{"n_routed_experts": 4, "moe_intermediate_size": 12, "first_k_dense_replace": 1, "n_group": 1},
        **{"topk_group": 1, "kv_lora_rank": 4, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
        **{"v_head_dim": 4, "num_key_value_heads": 4},
    },
    "gpt_oss": {"num_local_experts": 3, "intermediate_size": 16},  # square: only the model type tells the layout
    "llama4_text": {"num_local_experts": 3, "intermediate_size_mlp": 12, "moe_layers": [0, 1]},
    "granitemoe": {"num_local_experts": 3},
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
PATTERNS = {"rank_pattern": {"gate_up_proj": 3}, "alpha_pattern": {"experts.down_proj": 5}}


def save_mixture(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """A random model whose experts transformers holds in one parameter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind]}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.to(dtype).save_pretrained(folder)
    return folder
