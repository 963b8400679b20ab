"""Tiny models for every task a prompt can be learnt for, and prompts made of real words, which show what must come out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from peftcli import PeftModel, get_peft_model
from peftcli.adapters import kv_cache
from peftcli.adapters.registry import config_class

VOCAB, TOKENS = 40, 3
SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
GPT2 = hf.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
BERT = {**SMALL, "num_attention_heads": 2, "max_position_embeddings": 32, "num_labels": 3}
T5 = {
    **{"vocab_size": VOCAB, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 2},
    **{"decoder_start_token_id": 0, "dropout_rate": 0.0, "initializer_factor": 3.0},
}
BART = {
    **{"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32, "init_std": 0.3},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None},
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A model and a task.

    Attributes:
        name: for ids of tests.
        task: PEFT's task type.
        build: makes the model.
        padding: `right` or `left`.
        labels: what the model learns from, besides the text.
    """

    name: str
    task: str
    build: Callable[[], nn.Module]
    padding: str = "right"
    labels: Callable[[Tensor], dict[str, Tensor]] = field(default=lambda ids: {})

    @property
    def is_encoder_decoder(self) -> bool:
        return self.task == "SEQ_2_SEQ_LM"

    def model(self) -> Any:
        torch.manual_seed(0)
        return self.build().eval()

    def inputs(self) -> dict[str, Tensor]:
        """Two texts, the second shorter."""
        ids = torch.tensor([[5, 8, 13, 21, 34], [6, 7, 30, 31, 33]])
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        if self.padding == "left":
            mask = mask.flip(1)
        inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
        if self.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.tensor([[0, 9, 11, 4], [0, 3, 12, 8]])
        return inputs

    def __str__(self) -> str:
        return self.name


def per_token(ids: Tensor) -> dict[str, Tensor]:
    return {"labels": ids % 3}


def language(ids: Tensor) -> dict[str, Tensor]:
    return {"labels": ids.masked_fill(ids == 0, -100)}


def spans(ids: Tensor) -> dict[str, Tensor]:
    return {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([3, 2])}


def classes(ids: Tensor) -> dict[str, Tensor]:
    return {"labels": torch.tensor([2, 0])}


LLAMA = hf.LlamaConfig(**SMALL, **HEADS, initializer_range=0.3)
BASES = [
    Base("llama", "CAUSAL_LM", lambda: hf.LlamaForCausalLM(LLAMA), labels=language),
    Base("gpt2", "CAUSAL_LM", lambda: hf.GPT2LMHeadModel(GPT2), labels=language),
    Base("t5", "SEQ_2_SEQ_LM", lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), labels=language),
    Base("bart", "SEQ_2_SEQ_LM", lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)), labels=language),
    Base(
        "llama_classes",
        "SEQ_CLS",
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**SMALL, **HEADS, num_labels=3)),
        padding="left",
        labels=classes,
    ),
    Base("bert_classes", "SEQ_CLS", lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT)), labels=classes),
    Base("bert_tokens", "TOKEN_CLS", lambda: hf.BertForTokenClassification(hf.BertConfig(**BERT)), labels=per_token),
    Base("bert_spans", "QUESTION_ANS", lambda: hf.BertForQuestionAnswering(hf.BertConfig(**SMALL | {"num_attention_heads": 2})), labels=spans),
    Base("roberta", "FEATURE_EXTRACTION", lambda: hf.RobertaModel(hf.RobertaConfig(**BERT))),
]  # fmt: skip

LANGUAGE_MODELS = [
    Base(config.model_type, "CAUSAL_LM", lambda config=config: hf.AutoModelForCausalLM.from_config(config))
    for config in (
        LLAMA,
        GPT2,
        hf.MistralConfig(**SMALL, **HEADS, initializer_range=0.3, sliding_window=6),
        hf.Qwen2Config(**SMALL, **HEADS, initializer_range=0.3),
        hf.GemmaConfig(**SMALL, **HEADS, head_dim=8, initializer_range=0.3),
        hf.GPTNeoXConfig(**SMALL, num_attention_heads=2, initializer_range=0.3, max_position_embeddings=32),
        hf.OPTConfig(vocab_size=VOCAB, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32, word_embed_proj_dim=16, init_std=0.3, pad_token_id=0),
    )
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A prompt method with settings."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def stands_in_cache(self) -> bool:
        return self.method == "PREFIX_TUNING"

    @property
    def is_multitask(self) -> bool:
        return self.method == "MULTITASK_PROMPT_TUNING"

    def adapt(self, model: nn.Module, task: str, **options: Any) -> PeftModel:
        torch.manual_seed(1)
        settings = {"num_virtual_tokens": TOKENS, "task_type": task, **self.options, **options}
        return get_peft_model(model, config_class(self.method)(**copy.deepcopy(settings))).eval()

    def tasks(self, *ids: int) -> dict[str, Tensor]:
        """`task_ids` where the method wants them."""
        return {"task_ids": torch.tensor(ids)} if self.is_multitask else {}

    def __str__(self) -> str:
        return f"{self.method}({','.join(map(str, self.options.values()))})"


ROWS = [
    Row("PROMPT_TUNING"),
    Row("PROMPT_TUNING", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    Row("MULTITASK_PROMPT_TUNING", {"num_tasks": 3, "num_ranks": 2}),
    Row("P_TUNING", {"encoder_hidden_size": 8}),
    Row("P_TUNING", {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1}),
    Row("PREFIX_TUNING"),
    Row("PREFIX_TUNING", {"prefix_projection": True, "encoder_hidden_size": 8}),
]

WORDS = torch.tensor([17, 3, 28])
"""Real tokens, as many as the prompt has."""


def write_words(model: PeftModel, *, decoder: Tensor = WORDS) -> None:
    """Make the prompt of a plain method the embeddings of real words, so that the bare model can say what must come out."""
    encoder = model.prompt_encoder["default"]
    words = model.get_base_model().get_input_embeddings()
    with torch.no_grad():
        ids = torch.cat([WORDS, decoder])[: encoder.method.tokens]
        encoder.embedding.weight.copy_(words(ids))
        if hasattr(encoder, "prefix_task_cols"):  # cols rows = 1 everywhere
            encoder.prefix_task_cols.zero_()[..., 0] = 2
            encoder.prefix_task_rows.zero_()[:, 0] = 0.5


def write_cache(model: PeftModel, bare: Any) -> None:
    """Make the prefix what the bare decoder keeps of real words."""
    cache = kv_cache.given(bare(WORDS.unsqueeze(0), use_cache=True))
    with torch.no_grad():
        states = torch.stack([state for layer in cache.layers for state in (layer.keys[0], layer.values[0])])
        rows = states.permute(2, 0, 1, 3).flatten(1)  # [tokens, 2 layers * heads * head_dim]
        model.prompt_encoder["default"].embedding.weight.copy_(rows)
