"""Run folders as `peft train` prepares them, with a tiny base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from peftcli.data.part import Part
from peftcli.data.report import DataReport, PartReport
from peftcli.launchers import configs
from peftcli.recipe.load import dump_recipe
from peftcli.recipe.schema import Recipe
from peftcli.training.quiet import quiet_transformers
from training.tiny import VOCABULARY, random_data, tiny_llama

LORA = {"method": "lora", "r": 4, "target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.1}


def save_base(folder: Path, *, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    with quiet_transformers():
        tiny_llama(**sizes).to(dtype).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


def prepare_run(
    folder: Path,
    base: Path,
    adapter: dict[str, Any] | None = None,
    *,
    quantization: dict[str, Any] | None = None,
    launcher: dict[str, Any] | None = None,
    dtype: str = "auto",
    **training: Any,
) -> Path:
    """Everything the worker reads."""
    quick = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": str(base), "dtype": dtype},
            "adapter": adapter or LORA,
            "quantization": quantization,
            "data": {"train": "/data/train.jsonl"},
            "training": {"output_dir": str(folder), **quick, **training},
            "launcher": launcher or {"num_processes": "auto"},
        }
    )
    (folder / "data").mkdir(parents=True)
    configs.write(folder / "data", configs.resolve(recipe, 2))
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    train, held_out = random_data(), random_data(5, seed=1)
    train.save(folder / "data" / "train.safetensors")
    held_out.save(folder / "data" / "eval.safetensors")
    part = Part("train", recipe.data.train)
    part.dataset = train
    DataReport(PartReport.of(part), None, 0, 0, [], []).save(folder / "data" / "audit.json")
    return folder
