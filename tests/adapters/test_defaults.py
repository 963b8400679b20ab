"""Every method as it is without a choice of modules, on every architecture: which modules it takes, and that training,
saving, loading and merging hold; or the words it is refused with. The modules are those real PEFT 0.21.2 takes."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from torch import Tensor

from peftcli import PeftModel, get_peft_model
from peftcli.adapters.registry import METHODS, config_class

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
    pytest.mark.filterwarnings("ignore:target_modules. `"),  # a loaded config names what its model type usually has
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`"),
]

FIT: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAMSS": {"r": 7, "num_subspaces": 2},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "C3A": {"block_size": 4},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {"cpt_token_ids": [3, 4, 5]},
    "FOURIERFT": {"n_frequency": 50},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PSOFT": {"r": 4},
    "P_TUNING": {"num_virtual_tokens": 3},
    "RANDLORA": {"randlora_alpha": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5]},
    "VBLORA": {"vector_length": 4, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 50},
}
"""What must be given, and sizes whose default is larger than the tiny models. All else is the default."""

TAKEN = {
    "llama": "q_proj v_proj",
    "mistral": "q_proj v_proj",
    "mixtral": "q_proj v_proj",
    "qwen2": "q_proj v_proj",
    "gemma": "q_proj v_proj",
    "gpt2": "c_attn",
    "opt": "q_proj v_proj",
    "gpt_neox": "query_key_value",
    "bert": "query value",
    "roberta": "query value",
    "t5": "q v",
    "bart": "q_proj v_proj",
}
"""By model type, the last parts of the modules most methods take. A type without an entry has no usual ones."""

EVERY_LINEAR_OF_AN_MLP = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"
NORMS = "input_layernorm norm post_attention_layernorm"
SIX = "fc1 fc2 k_proj out_proj q_proj v_proj"
OTHERWISE: dict[str, dict[str, str | None]] = {
    "IA3": {
        "llama": "down_proj k_proj v_proj",
        "mistral": "down_proj k_proj v_proj",
        "mixtral": "k_proj v_proj",
        "qwen2": "down_proj q_proj v_proj",
        "gemma": "down_proj q_proj v_proj",
        "gpt2": "c_attn c_proj",
        "opt": "fc2 k_proj q_proj",
        "gpt_neox": "dense_4h_to_h query_key_value",
        "bert": "dense key value",
        "roberta": "dense key value",
        "t5": "k v wo",
        "bart": "fc2 q_proj v_proj",
    },
    "LN_TUNING": dict.fromkeys(TAKEN)
    | dict.fromkeys(("llama", "mistral", "gemma"), NORMS)
    | {
        "qwen2": "post_attention_layernorm",
        "gpt2": "ln_1 ln_2 ln_f",
        "t5": "final_layer_norm layer_norm",
        "bart": "encoder_attn_layer_norm final_layer_norm self_attn_layer_norm",
    },
    "TRAINABLE_TOKENS": dict.fromkeys(TAKEN, "embed_tokens")
    | {"gpt2": "wte", "gpt_neox": "embed_in", "bert": "word_embeddings", "roberta": "word_embeddings"}
    | {"t5": "shared", "bart": "shared"},
    "OSF": dict.fromkeys(("llama", "mistral", "qwen2", "gemma"), EVERY_LINEAR_OF_AN_MLP)
    | {
        "mixtral": "k_proj o_proj q_proj v_proj",
        "gpt2": "c_attn c_proj",
        "opt": SIX,
        "gpt_neox": "dense_4h_to_h query_key_value",
        "bert": "dense key query value",
        "roberta": "dense key query value",
        "t5": "k o q v wi wo",
        "bart": SIX,
        "vit": "fc1 fc2 k_proj o_proj q_proj v_proj",
        "wav2vec2": "intermediate_dense k_proj out_proj output_dense projection projector q_proj v_proj",
    },
    "ADAPTION_PROMPT": dict.fromkeys(TAKEN) | {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"},
    "ADALORA": {"opt": SIX, "roberta": "dense key query value", "t5": "k o q v wi wo", "bart": SIX},
    "VBLORA": {"opt": SIX, "t5": "k o q v wi wo", "bart": SIX},
    "FOURIERFT": {"gpt2": "c_proj"},
    "C3A": {"gpt2": "c_proj"},
    "WAVEFT": {"gpt2": "c_proj"},
    "BEFT": {"gpt2": None, "gpt_neox": None, "t5": "v", "bert": "value", "roberta": "value"}
    | dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "gemma", "opt", "bart"), "v_proj"),
}
"""Where a method takes others than most; None: it knows no usual ones."""

PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE", "CPT"}
TASKS = {
    "CausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ConditionalGeneration": "SEQ_2_SEQ_LM",
    "BertForSequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
}
METHODS_HERE = [name for name in METHODS if name != "XLORA"]  # it adapts nothing but the experts it is given


def model_type(architecture: Architecture) -> str:
    return architecture.name.partition("_")[0] if architecture.name.startswith("llama") else architecture.name


def task(method: str, architecture: Architecture) -> str | None:
    wants_task = method in PROMPTS or method == "ADAPTION_PROMPT"
    return next((task for end, task in TASKS.items() if wants_task and architecture.model.endswith(end)), None)


def taken(method: str, architecture: Architecture) -> str | None:
    kind = model_type(architecture)
    return OTHERWISE.get(method, {}).get(kind, TAKEN.get(kind))


def refusal(method: str, architecture: Architecture) -> str | None:
    """What the refusal must say, or None where the method is to work."""
    if method in PROMPTS:
        known = task(method, architecture)
        if known is None:
            return "a prompt must know the task"
        return "only supports task_type = CAUSAL_LM" if method == "CPT" and known != "CAUSAL_LM" else None
    if taken(method, architecture) is not None:
        return None
    if method == "ADAPTION_PROMPT":
        return "Unsupported model type for adaption prompt"
    # PEFT's names for ViT's modules are those of transformers 4; a ResNet has no linear layer but its head.
    elsewhere = {("ADAMSS", "vit"), ("FROD", "vit"), ("OSF", "resnet")}
    if (method, architecture.name) in elsewhere:
        return "Target modules .* not found in the base model"
    is_pixels = (method, architecture.name) == ("TRAINABLE_TOKENS", "vit")
    return "ViTPatchEmbeddings is not supported" if is_pixels else "Please specify `target_modules`"


def build(method: str, architecture: Architecture) -> PeftModel:
    config = config_class(method)(task_type=task(method, architecture), **copy.deepcopy(FIT.get(method, {})))
    return get_peft_model(architecture.build(), config)


def run(method: str, architecture: Architecture, model: torch.nn.Module) -> Tensor:
    tasks = {"task_ids": torch.tensor([0, 0])} if method in ("POLY", "MULTITASK_PROMPT_TUNING") else {}
    output = model(**architecture.inputs(), **tasks)
    return output.logits if "logits" in output else output.last_hidden_state


def cases() -> list[Any]:
    """All pairs; three of four are slow, and the others have each method and each architecture among them."""
    return [
        pytest.param(
            method, architecture, id=f"{method}-{architecture}", marks=[pytest.mark.slow] * bool((row + column) % 4)
        )
        for row, method in enumerate(METHODS_HERE)
        for column, architecture in enumerate(ARCHITECTURES)
    ]


@pytest.mark.parametrize(("method", "architecture"), cases())
def test_defaults(method: str, architecture: Architecture, tmp_path: Path) -> None:
    words = refusal(method, architecture)
    if words is not None:
        with pytest.raises(ValueError, match=words):
            run(method, architecture, build(method, architecture))
        return
    model = build(method, architecture)
    if method not in PROMPTS:
        assert leaves(model) == set((taken(method, architecture) or "").split())

    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    run(method, architecture, model).square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    optimizer.step()
    disturb(model)
    model.eval()

    with torch.no_grad():
        expected = run(method, architecture, model)
        base = architecture.build()
        before = architecture.run(base)
        assert (expected[:, -before.shape[1] :] - before).abs().max() > 1e-6  # a prompt's own outputs come first
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base, tmp_path)
        torch.testing.assert_close(run(method, architecture, loaded), expected, atol=1e-6, rtol=1e-5)
        if method in PROMPTS or not mergeable(loaded):
            return
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(architecture.run(merged), expected, atol=1e-4, rtol=1e-4)


def leaves(model: PeftModel) -> set[str]:
    """The last parts of the modules that have tensors of their own: not those that are tied to one."""
    attached = model.base_model.attached
    paths = [path for path, layer in attached.layers() if layer.leader("default") is None]
    paths += [path for path, _ in attached.copies()]
    return {re.sub(r"(\.base_layer)+$", "", path).rpartition(".")[2] for path in paths}


def disturb(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def mergeable(model: PeftModel) -> bool:
    adapters = (a for _, layer in model.base_model.attached.layers() for a in layer.adapters.values())
    return all(adapter.merge_problem() is None for adapter in adapters)
