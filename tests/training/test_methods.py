"""Each method's recipe in recipes/methods, shrunk to a tiny base: trained, saved, verified, and resumed bit for bit."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM

from peftcli import LoraConfig, get_peft_model
from peftcli.adapters.registry import method_names
from peftcli.recipe.load import load_recipe
from peftcli.training import worker
from training.run_folders import prepare_run, save_base

RECIPES = {path.stem: path for path in sorted((Path(__file__).parents[2] / "recipes" / "methods").glob("*.yaml"))}

SHRUNK: dict[str, dict[str, Any]] = {
    "adaption-prompt": {"adapter_layers": 1},
    "adalora": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1},
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 8},
    "cpt": {"cpt_token_ids": [1, 2, 3, 4, 5, 6]},
    "eva": {"r": 2},
    "fourierft": {"n_frequency": 20},
    "lora-ga": {"r": 2},
    "oft": {"oft_block_size": 8},
    "road": {"group_size": 8},
    "trainable-tokens": {"trainable_token_indices": [3, 5]},
    "vblora": {"vector_length": 8, "num_vectors": 12},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 20},
}
"""Sizes that fit 16 hidden features instead of 576."""

OTHER_RECIPES = {"multitask_prompt_tuning", "trainable_tokens", "xlora"}
"""Methods whose settings are not one base's: task numbers, adapters to route; they are trained in tests of their own."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "tiny")


def adapter_of(name: str) -> dict[str, Any]:
    section = load_recipe(RECIPES[name]).model_dump(mode="json")["adapter"]
    small = {key: min(value, 4) for key, value in section.items() if key == "r" and value}
    return {**section, **small, **SHRUNK.get(name, {})}


def test_every_method_has_a_recipe() -> None:
    methods = {load_recipe(path).adapter.method for path in RECIPES.values()}
    assert methods | OTHER_RECIPES >= set(method_names())


@pytest.mark.parametrize("name", RECIPES)
def test_trained_verified_and_resumed(name: str, base: Path, tmp_path: Path) -> None:
    folder = prepare_run(tmp_path / "run", base, adapter_of(name))
    result = worker.run(folder, console=Console(file=io.StringIO()))
    assert result is not None
    assert result.difference < 1e-5
    written = folder / ("model.safetensors" if name == "full" else "adapter_model.safetensors")
    before = written.read_bytes()
    written.unlink()
    shutil.rmtree(folder / "checkpoint-4")
    worker.run(folder, resume="auto", console=Console(file=io.StringIO()))
    assert written.read_bytes() == before


@pytest.mark.parametrize("trainable", [False, True])
def test_a_gate_and_its_experts_are_resumed(trainable: bool, base: Path, tmp_path: Path) -> None:
    """X-LoRA: the gate alone, or the experts with it."""
    experts = {}
    for number, name in enumerate(("law", "art")):
        torch.manual_seed(number)
        model = get_peft_model(
            LlamaForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )
        model.save_pretrained(tmp_path / name)
        experts[name] = str(tmp_path / name)
    adapter = {"method": "xlora", "adapters": experts, "use_trainable_adapters": trainable, "xlora_depth": 1}
    folder = prepare_run(tmp_path / "run", base, adapter)
    result = worker.run(folder, console=Console(file=io.StringIO()))
    assert result is not None and result.difference < 1e-5
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors") if "checkpoint-2" not in str(path)}
    assert any(path.parent.name == "law" for path in before) == trainable
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "adapter_model.safetensors").unlink()
    worker.run(folder, resume="auto", console=Console(file=io.StringIO()))
    assert {path: path.read_bytes() for path in before} == before
