"""Tiny models of the architectures people adapt, built from configs without any download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GQA = {"num_key_value_heads": 2}
IDS = torch.arange(2, 14).reshape(2, 6)


@dataclass(frozen=True)
class Architecture:
    """How to build one, what to feed it, and what to adapt.

    Attributes:
        name: for the test's name.
        model: transformers' class.
        config: transformers' config class.
        options: config fields.
        inputs: keyword arguments of one forward pass.
        targets: modules to adapt; None takes the usual ones of the model type.
        conv_targets: convolutions to adapt, where there are some.
    """

    name: str
    model: str
    config: str
    options: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]] = lambda: {"input_ids": IDS}
    targets: list[str] | None = None
    conv_targets: list[str] = field(default_factory=list)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        return getattr(transformers, self.model)(config).eval()

    def run(self, model: nn.Module) -> Tensor:
        output = model(**self.inputs())
        return output.logits if "logits" in output else output.last_hidden_state

    def __str__(self) -> str:
        return self.name


def _seq2seq() -> dict[str, Tensor]:
    return {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}


T5 = {
    "vocab_size": 48,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 48,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}
GPT2 = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
OPT = {
    "vocab_size": 48,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
BERT = SMALL | {"num_labels": 3, "max_position_embeddings": 32}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
WAV2VEC2 = SMALL | {
    "conv_dim": [8, 8],
    "conv_stride": [4, 2],
    "conv_kernel": [6, 3],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_labels": 3,
    "classifier_proj_size": 8,
}

ARCHITECTURES = [
    Architecture("llama_gqa", "LlamaForCausalLM", "LlamaConfig", SMALL | GQA),
    Architecture(
        "llama_biased_tied",
        "LlamaForCausalLM",
        "LlamaConfig",
        SMALL | {"attention_bias": True, "tie_word_embeddings": True},
    ),
    Architecture("mistral", "MistralForCausalLM", "MistralConfig", SMALL | GQA),
    Architecture("qwen2", "Qwen2ForCausalLM", "Qwen2Config", SMALL | GQA),
    Architecture("gemma", "GemmaForCausalLM", "GemmaConfig", SMALL | GQA | {"head_dim": 4}),
    Architecture("mixtral", "MixtralForCausalLM", "MixtralConfig", SMALL | GQA | {"num_local_experts": 2}),
    Architecture("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT2),
    Architecture("opt", "OPTForCausalLM", "OPTConfig", OPT),
    Architecture("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL),
    Architecture("bert", "BertForSequenceClassification", "BertConfig", BERT),
    Architecture("roberta", "RobertaForTokenClassification", "RobertaConfig", BERT | {"pad_token_id": 1}),
    Architecture("t5", "T5ForConditionalGeneration", "T5Config", T5, _seq2seq),
    Architecture("bart", "BartForConditionalGeneration", "BartConfig", BART, _seq2seq),
    Architecture(
        "vit",
        "ViTForImageClassification",
        "ViTConfig",
        VIT,
        lambda: {"pixel_values": torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8)},
        ["query", "value", "q_proj", "v_proj"],
        ["projection"],
    ),
    Architecture(
        "resnet",
        "ResNetForImageClassification",
        "ResNetConfig",
        RESNET,
        lambda: {"pixel_values": torch.linspace(-1, 1, 6144).reshape(2, 3, 32, 32)},
        ["convolution"],
        ["convolution"],
    ),
    Architecture(
        "wav2vec2",
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        WAV2VEC2,
        lambda: {"input_values": torch.linspace(-1, 1, 400).reshape(2, 200)},
        ["q_proj", "v_proj"],
        ["conv_layers.0.conv", "conv_layers.1.conv"],
    ),
]
