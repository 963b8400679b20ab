"""Adapters whose start comes from data, from a recipe."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from peftcli.training import worker
from training.run_folders import prepare_run, save_base

STARTS: list[dict[str, Any]] = [
    {"init_lora_weights": "eva", "eva_config": {"rho": 1.5}},
    {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    {"init_lora_weights": "lora_ga", "lora_ga_config": {"scale": "gd_scale"}},
    {"init_lora_weights": "pissa"},
]


@pytest.mark.parametrize("start", STARTS, ids=lambda start: start["init_lora_weights"])
def test_trained_saved_and_resumed(start: dict[str, Any], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = {"method": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"], **start}
    whole = prepare_run(tmp_path / "whole", base, adapter)
    result = worker.run(whole, console=Console(file=io.StringIO()))
    assert result is not None
    assert result.difference < 1e-5
    config = json.loads((whole / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == ("eva" if start["init_lora_weights"] == "eva" else True)
    halves = prepare_run(tmp_path / "halves", base, adapter)
    worker.run(halves, console=Console(file=io.StringIO()))
    before = (halves / "adapter_model.safetensors").read_bytes()
    (halves / "adapter_model.safetensors").unlink()
    shutil.rmtree(halves / "checkpoint-4")
    worker.run(halves, resume=str(halves / "checkpoint-2"), console=Console(file=io.StringIO()))
    assert (halves / "adapter_model.safetensors").read_bytes() == before
