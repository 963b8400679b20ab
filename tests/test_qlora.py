"""The recipes with a quantised base, shrunk to a tiny one and run as a user runs them: train, resume, evaluate."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from data.families import family
from test_end_to_end import ANSWERS, peft
from training.tiny import tiny_llama

from peftcli.recipe.load import load_recipe
from peftcli.training.footprint import BatchShape, footprint

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = ["quickstart-qlora", "qlora-llama"]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the quantization extra")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base in bfloat16, and data."""
    folder = tmp_path_factory.mktemp("user")
    tokenizer = family("chatml")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 128}
    tiny_llama(vocab_size=len(tokenizer), **sizes).to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ANSWERS.items()]
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"messages": t}) + "\n" for t in turns * 4), encoding="utf-8"
    )
    return folder


def arguments(name: str) -> list[str | Path]:
    """`peft train` of a recipe on the tiny base: some more steps, everything else as it is."""
    changes = {
        "model.name_or_path": "base",
        "data.train": "train.jsonl",
        "data.eval.split": 0.25,
        "data.max_length": 64,
        "training.output_dir": name,
        "training.gradient_accumulation_steps": 1,
        "training.num_train_epochs": 3,
        "training.save_steps": 3,
        "training.logging_steps": 1,
    }
    return ["train", RECIPES / f"{name}.yaml", *(f"{field}={value}" for field, value in changes.items())]


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["quickstart-qlora", "qlora-llama", "qlora-70b-fsdp"])
def test_checked(place: Path, name: str) -> None:
    assert "a valid recipe" in peft("train", RECIPES / f"{name}.yaml", "--check", cwd=place).stdout


def test_llama_is_trained_and_resumed(place: Path) -> None:
    name = "qlora-llama"
    peft(*arguments(name), cwd=place)
    run, result = place / name, result_of(place / name)
    assert result["difference"] == 0 and result["quantization"]["bnb_4bit_quant_type"] == "nf4"
    trained = (run / "adapter_model.safetensors").read_bytes()
    (run / "adapter_model.safetensors").unlink()
    shutil.rmtree(run / f"checkpoint-{result['steps']}")
    peft(*arguments(name), "--resume", "auto", cwd=place)
    assert (run / "adapter_model.safetensors").read_bytes() == trained


def test_quickstart_is_trained_and_evaluated(place: Path) -> None:
    name = "quickstart-qlora"
    peft(*arguments(name), cwd=place)
    loss = result_of(place / name)["metrics"]["eval_loss"]
    peft("eval", name, "--metrics", "loss", "--output", "results.json", cwd=place)
    metrics = json.loads((place / "results.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics[0]["adapters"]["tuned"]["value"] == pytest.approx(loss, rel=1e-2), (
        "the base is quantised as it was in training"
    )


def test_the_sharded_one_is_planned_and_trained(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "qlora-70b-fsdp"
    monkeypatch.chdir(place)
    recipe = load_recipe(RECIPES / f"{name}.yaml", overrides=("model.name_or_path=base",), check_paths=False)
    alone, shared = (
        footprint(recipe, BatchShape(1, 16, 8), device=torch.device("cpu"), sharded_over=count) for count in (1, 2)
    )
    assert shared.base == pytest.approx(alone.base / 2, abs=1)
    assert shared.gathered > 0 == alone.gathered and shared.adapter == alone.adapter
    assert shared.peak - alone.peak == shared.base + shared.gathered - alone.base
    assert "2 processes share the base (FSDP2)" in peft(*arguments(name), cwd=place).stdout
    assert result_of(place / name)["difference"] == 0
