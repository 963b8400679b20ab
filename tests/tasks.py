"""A tiny base, learnable data and a recipe for each task: one row a task."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from training.tiny import save_tiny_llama
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "cat",
    "dog",
    "bird",
    "runs",
    "sleeps",
    "eats",
    "who",
    "what",
    "does",
    "the",
    "is",
    "good",
    "bad",
]


def words_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One token a word, with BERT's special tokens or T5's."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if kind == "bert" else ["<pad>", "<unk>", "</s>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "bert":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
    else:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
        names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
        inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def save_bert(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = words_tokenizer("bert")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=0, initializer_range=0.3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_t5(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = words_tokenizer("t5")
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Row:
    """A task.

    Args:
        base: writes its tiny base.
        row: sample number -> a row of the data.
        recipe: sections of the recipe that differ from the others'.
        metric: what rises while it learns.
    """

    base: Callable[[Path], None]
    row: Callable[[int], dict[str, Any]]
    recipe: dict[str, Any] = field(default_factory=dict)
    metric: str = "eval_accuracy"


def colour(number: int) -> str:
    return WORDS[number % 3]


def _qa(number: int) -> dict[str, Any]:
    context = f"the {WORDS[6 + number % 3]} is {colour(number)} the {WORDS[6 + (number + 1) % 3]} runs"
    return {
        "question": "what is it", "context": context,
        "answers": {"text": [colour(number)], "answer_start": [context.index(colour(number))]},
    }  # fmt: skip


TASKS = {
    "SEQ_CLS": Row(
        save_bert,
        lambda number: {
            "text": f"the {WORDS[6 + number % 2]} {WORDS[9 + number % 3]}",
            "label": ("cat", "dog")[number % 2],
        },
        metric="eval_accuracy",
    ),
    "TOKEN_CLS": Row(
        save_bert,
        lambda number: {
            "tokens": ["the", colour(number), WORDS[6 + number % 3], "runs"],
            "tags": ["O", "B-COL", "B-ANI" if number % 3 else "O", "O"],
        },
        metric="eval_span_f1",
    ),
    "QUESTION_ANS": Row(save_bert, _qa, metric="eval_window_exact_match"),
    "FEATURE_EXTRACTION": Row(
        save_bert,
        lambda number: {"anchor": f"{WORDS[number % 12]} runs", "positive": f"the {WORDS[number % 12]} sleeps"},
        {"training": {"temperature": 0.05}},
    ),
    "SEQ_2_SEQ_LM": Row(
        save_t5,
        lambda number: {"source": f"{colour(number)} cat", "target": f"the cat is {colour(number)}"},
        metric="eval_token_accuracy",
    ),
    "dpo": Row(
        save_tiny_llama,
        lambda number: {"prompt": f"what {number}", "chosen": "fine thanks", "rejected": "hello world"},
        {"preference": {"loss": "dpo", "beta": 0.5}},
    ),
    "orpo": Row(
        save_tiny_llama,
        lambda number: {"prompt": f"what {number}", "chosen": "fine thanks", "rejected": "hello world"},
        {"preference": {"loss": "orpo"}},
    ),
}


def make_run(name: str, folder: Path, **training: Any) -> Path:
    """A user's folder for a task; the recipe's path."""
    row = TASKS[name]
    row.base(folder / "base")
    lines = [json.dumps(row.row(number)) for number in range(24)]
    (folder / "train.jsonl").write_text("\n".join(lines[:18]))
    (folder / "eval.jsonl").write_text("\n".join(lines[18:]))
    recipe = {
        "model": {"name_or_path": "base", "task_type": name if name.isupper() else "CAUSAL_LM"},
        "adapter": {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 64},
        **{section: values for section, values in row.recipe.items() if section != "training"},
        "training": {
            "output_dir": str(folder / "run"), "per_device_train_batch_size": 6, "max_steps": 40, "learning_rate": 2e-2,
            "eval_steps": 20, "save_steps": 20, "logging_steps": 5, "metric_for_best_model": row.metric,
            **row.recipe.get("training", {}), **training,
        },
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path
