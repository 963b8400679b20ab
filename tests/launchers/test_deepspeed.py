"""DeepSpeed's files: what the recipe decides is filled in, what contradicts it is refused with both places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftcli.errors import InputError
from peftcli.launchers.configs import resolve
from peftcli.recipe.schema import Recipe


def recipe(config: str, **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name_or_path": "base"},
            "adapter": {"method": "lora"},
            "data": {"train": "train.jsonl"},
            "training": {"output_dir": "out", "per_device_train_batch_size": 2, **training},
            "launcher": {"type": "deepspeed", "num_processes": 2, "config": config},
        }
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_recipes_values_are_filled_in(stage: int) -> None:
    values = resolve(recipe(f"zero{stage}", gradient_accumulation_steps=3, max_grad_norm=0.5), 2)
    assert values["zero_optimization"]["stage"] == stage
    assert values["train_batch_size"] == 12 and values["gradient_clipping"] == 0.5
    assert "auto" not in json.dumps(values)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ({"zero_optimization": {"stage": 2}, "train_batch_size": 5}, "train_batch_size: is 5, but the recipe says"),
        ({"zero_optimization": {"stage": 3, "memory_efficient_linear": True}}, "would replace torch's linear layers"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "zero_quantized_weights: is not supported",
        ),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: is 4"),
        ({"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW"}}, "optimizer: is decided by the recipe"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "offloading is not supported"),
    ],
)
def test_what_is_refused(tmp_path: Path, file: dict[str, Any], says: str) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(file))
    with pytest.raises(InputError) as error:
        resolve(recipe(str(path), gradient_accumulation_steps=1), 2)
    assert says in str(error.value)
