"""How much of a base each of two processes holds while it loads, adapts and shards it."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from training.run_folders import prepare_run, save_base
from training.side_by_side import DDP, FSDP, LORA, Launcher, Row, in_two_processes

SHARDED: dict[str, Launcher] = {"fsdp": FSDP}
if find_spec("deepspeed") is not None:
    SHARDED["zero3"] = {"type": "deepspeed", "num_processes": 2, "config": "zero3"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_holds_more_of_a_base_than_it_keeps(tmp_path: Path) -> None:
    """Half of it and a layer; one that is converted is held whole by the one process that converts it."""
    base = save_base(
        tmp_path / "base", hidden_size=768, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8
    )
    size = (base / "model.safetensors").stat().st_size
    runs, small = tmp_path / "runs", save_base(tmp_path / "small")
    Row(LORA).prepare(runs / "whole", base, DDP)
    for name, launcher in SHARDED.items():
        Row(LORA).prepare(runs / f"0-{name}", small, launcher)  # first: what loads and trains is itself loaded
        Row(LORA).prepare(runs / name, base, launcher)
        prepare_run(runs / f"{name}-converted", base, LORA, launcher=launcher, dtype="bfloat16")
    in_two_processes("memory_ranks.py", runs)
    first, second = (json.loads((runs / f"memory-{rank}.json").read_text()) for rank in (0, 1))
    for rank in (first, second):
        assert rank["whole"]["peak"] > 0.95 * size, "the measure sees a whole base"
    for name in SHARDED:
        for rank in (first, second):
            assert rank[name]["peak"] < 0.75 * size, name
            assert rank[name]["held"] < 0.65 * size, name
            assert rank[f"{name}-converted"]["held"] < 0.65 * size / 2, name
        assert second[f"{name}-converted"]["peak"] < 0.75 * size / 2, name
        assert first[f"{name}-converted"]["peak"] < 1.5 * size / 2, name
