"""DeepSpeed's files: what the recipe decides is filled in, what contradicts it is refused with both places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftcli.errors import InputError
from peftcli.launchers.configs import resolve
from peftcli.launchers.deepspeed import offloaded
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


def offload(stage: int, **options: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **options}}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_recipes_values_are_filled_in(stage: int) -> None:
    values = resolve(recipe(f"zero{stage}", gradient_accumulation_steps=3, max_grad_norm=0.5), 2)
    assert values["zero_optimization"]["stage"] == stage
    assert values["train_batch_size"] == 12 and values["gradient_clipping"] == 0.5
    assert "auto" not in json.dumps(values)


@pytest.mark.parametrize(
    ("zero", "found"),
    [
        ({"stage": 1, "offload_optimizer": {"device": "cpu"}}, {"offload_optimizer"}),
        ({"stage": 2, "offload_optimizer": {"device": "none"}, "offload_param": None}, set()),
        ({"stage": 3, "offload_param": {"device": "cpu", "pin_memory": False}}, {"offload_param"}),
    ],
)
def test_what_is_offloaded(tmp_path: Path, zero: dict[str, Any], found: set[str]) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    values = resolve(recipe(str(path)), 2)
    assert offloaded(values) == found and values["zero_force_ds_cpu_optimizer"] is False


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
        (offload(1, offload_optimizer={"device": "nvme"}), "offload_optimizer.device: is 'nvme'"),
        (offload(2, offload_optimizer={"device": "cpu", "ratio": 0.5}), "offload_optimizer.ratio: is not supported"),
        (offload(3, offload_param={"device": "cpu", "pin_memory": 1}), "offload_param.pin_memory: is 1"),
        (offload(3, offload_param="cpu"), "offload_param: is 'cpu'"),
        (offload(2, offload_param={"device": "cpu"}), "offload_param: needs a sharded base"),
        (offload(2, cpu_offload=True), "cpu_offload: is not supported"),
        ({"zero_optimization": {"stage": 2}, "zero_force_ds_cpu_optimizer": True}, "has to be compiled"),
    ],
)
def test_what_is_refused(tmp_path: Path, file: dict[str, Any], says: str) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(file))
    with pytest.raises(InputError) as error:
        resolve(recipe(str(path), gradient_accumulation_steps=1), 2)
    assert says in str(error.value)
