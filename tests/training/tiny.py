"""Tiny models and data for the loop's tests, built from configs: no files, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from data.families import family
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peftcli.data.tokens import TokenDataset
from peftcli.recipe.training_section import TrainingSection
from peftcli.training.callbacks import Callback
from peftcli.training.loop import Trainer
from peftcli.training.strategies.plain import Strategy

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


def save_tiny_llama(folder: Path, positions: int = 128) -> None:
    """A base as a user has it, with a tokenizer that has a chat template."""
    tokenizer = family("chatml")
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=positions).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def disturbed(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with noise in everything it trains, so that nothing is zero any more."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


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


def random_data(samples: int = 24, seed: int = 0, longest: int = 12) -> TokenDataset:
    """Samples of different lengths with different shares of supervised tokens, at least one each."""
    generator = np.random.default_rng(seed)
    pairs = []
    for _ in range(samples):
        length = int(generator.integers(3, longest + 1))
        supervised = generator.random(length) < generator.random()
        supervised[0], supervised[-1] = False, True
        pairs.append((generator.integers(1, VOCABULARY, length).astype(np.int32), supervised))
    return TokenDataset.from_samples(pairs)


def settings(**values: Any) -> TrainingSection:
    """A `training` section that writes nothing unless asked to."""
    quiet = {"save_strategy": "no", "load_best_model_at_end": False, "logging_steps": 1, "warmup_ratio": 0.0}
    return TrainingSection(**{"output_dir": "out", **quiet, **values})


class Recorder(Callback):
    """Keeps every log row, without what depends on the clock."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self.rows.append({k: v for k, v in row.items() if k not in ("tokens_per_second", "memory")})


def trainer(folder: Path, model: nn.Module | None = None, **values: Any) -> Trainer:
    """A one-process trainer of a tiny Llama; `values` are settings, or Trainer's arguments."""
    names = (
        "train_data",
        "eval_data",
        "callbacks",
        "export",
        "received_signal",
        "published_step",
        "manifest",
        "row_length",
    )
    arguments = {name: values.pop(name) for name in names if name in values}
    data = arguments.pop("train_data", None) or random_data()
    section = settings(**values)
    return Trainer(model or tiny_llama(), data, section, folder, strategy=Strategy(section), **arguments)
