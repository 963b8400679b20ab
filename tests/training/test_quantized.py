"""Bases in 4 and 8 bits: loaded as the recipe says, trained on, and resumed bit for bit."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from peftcli import LoraConfig, get_peft_model
from peftcli.adapters.quantized import is_quantized
from peftcli.errors import InputError
from peftcli.recipe.schema import ModelSection, QuantizationSection
from peftcli.training import worker
from peftcli.training.model import load_base, open_base
from peftcli.training.quantized import quantized_bytes
from peftcli.training.quiet import quiet_transformers
from training.run_folders import prepare_run, save_base

bnb = pytest.importorskip("bitsandbytes", reason="needs the quantization extra")

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

WIDE = {"hidden_size": 64, "intermediate_size": 128}
NF4 = {"load_in_4bit": True}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nf4_double_bf16": {**NF4, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "bfloat16"},
    "fp4": {**NF4, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float32"},
    "int8": {"load_in_8bit": True},
}
kinds = pytest.mark.parametrize("kind", KINDS)
IDS = torch.arange(1, 12)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bfloat16, as bases come."""
    return save_base(tmp_path_factory.mktemp("base") / "tiny", dtype=torch.bfloat16, **WIDE)


def load(base: Path, **quantization: Any) -> Any:
    section = QuantizationSection(**quantization) if quantization else None
    return load_base(ModelSection(name_or_path=str(base)), section)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_quantized(module)}


@kinds
@torch.no_grad()
def test_every_linear_layer_but_the_head(base: Path, kind: str) -> None:
    model, plain = load(base, **KINDS[kind]), load(base)
    found = layers(model)
    assert len(found) == 14 and "lm_head" not in found
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert {p.dtype for name, p in model.named_parameters() if "norm" in name} == {torch.float32}
    assert model(IDS).logits.dtype == torch.bfloat16
    stored = model.model.layers[0].mlp.up_proj
    if kind != "int8":
        assert stored.weight.dtype == getattr(torch, KINDS[kind].get("bnb_4bit_quant_storage", "uint8"))
        assert stored.compute_dtype == getattr(torch, KINDS[kind].get("bnb_4bit_compute_dtype", "bfloat16"))
    adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj"]))
    weight = adapted.base_model.model.model.layers[0].mlp.up_proj.site.weight()
    original = plain.model.layers[0].mlp.up_proj.weight
    assert (weight.float() - original.float()).norm() < (0.01 if kind == "int8" else 0.15) * original.float().norm()


@kinds
def test_the_memory_plan_counts_what_is_stored(base: Path, kind: str) -> None:
    section = QuantizationSection(**KINDS[kind])
    empty = open_base(ModelSection(name_or_path=str(base))).empty()
    saved, expanded = quantized_bytes(section, empty)
    stored = {
        name: tensor.nbytes
        for name, tensor in load(base, **KINDS[kind]).state_dict().items()
        if any(part in name for part in ("_proj.weight", "_proj.SCB")) and "quant_state" not in name
    }
    plain = sum(p.nbytes for name, p in empty.named_parameters() if "_proj" in name)
    assert plain - saved == sum(size for name, size in stored.items() if not name.endswith("weight_format"))
    assert expanded == 64 * 128 * (4 if kind == "fp4" else 2)


def test_skipping_modules_still_skips_the_head(base: Path) -> None:
    found = layers(load(base, **NF4, llm_int8_skip_modules=["q_proj"]))
    assert len(found) == 12 and not any("q_proj" in name or "lm_head" in name for name in found)


@pytest.mark.parametrize("kind", ["nf4", "nf4_double_bf16"])
@torch.no_grad()
def test_evaluating_changes_nothing(base: Path, kind: str) -> None:
    """bitsandbytes repacks the weight in an eval forward on some CPUs; a run that evaluates could not be resumed."""
    model = load(base, **KINDS[kind])
    before = {name: layer.weight.data.view(torch.uint8).clone() for name, layer in layers(model).items()}
    logits = model.train()(IDS).logits
    model.eval()(IDS)
    assert all(torch.equal(layer.weight.data.view(torch.uint8), before[name]) for name, layer in layers(model).items())
    assert torch.equal(model.train()(IDS).logits, logits)


@torch.no_grad()
def test_a_base_that_is_stored_quantised(base: Path, tmp_path: Path) -> None:
    model = load(base, **NF4)
    with quiet_transformers():
        model.save_pretrained(tmp_path)
    shutil.copy(base / "tokenizer.json", tmp_path)
    assert torch.equal(load(tmp_path)(IDS).logits, model(IDS).logits)
    assert torch.equal(load(tmp_path, **NF4)(IDS).logits, model(IDS).logits)
    with pytest.raises(InputError, match="can't be trained in full"):
        worker.run(prepare_run(tmp_path / "run", tmp_path, {"method": "full"}))
    for change in ({"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_use_double_quant": True}):
        with pytest.raises(InputError, match=f"quantization.{next(iter(change))}.*stored quantised"):
            load(tmp_path, **NF4, **change)
    with pytest.raises(InputError, match=r"quantization\.load_in_8bit"):
        load(tmp_path, load_in_8bit=True)


@kinds
@torch.no_grad()
def test_merged_in_the_precision_of_the_model(base: Path, kind: str) -> None:
    model = get_peft_model(load(base, **KINDS[kind]), LoraConfig(target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)
    expected = model.eval()(IDS).logits.float()
    merged = model.merge_and_unload()
    assert {type(merged.model.layers[0].mlp.down_proj), merged.model.layers[0].mlp.down_proj.weight.dtype} == {
        nn.Linear,
        torch.bfloat16,
    }
    assert (merged(IDS).logits.float() - expected).norm() < 0.1 * expected.norm()


def test_refused_by_name(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = save_base(tmp_path / "narrow", hidden_size=6, intermediate_size=9)
    with pytest.raises(InputError, match=r"mlp.up_proj: quantization.bnb_4bit_quant_storage.*\n.*uint8 holds"):
        load(narrow, **NF4, bnb_4bit_quant_storage="bfloat16")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"quantization: needs the package bitsandbytes.*\n.*pip install"):
        load(base, **NF4)


def test_what_needs_the_weight_itself_is_refused(base: Path) -> None:
    model = load(base, **NF4)
    loftq = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    for message, config in {
        "would have to change": LoraConfig(target_modules=["q_proj"], **loftq),
        "cannot be applied to quantised": LoraConfig(target_modules=["q_proj"], modules_to_save=["k_proj"]),
    }.items():
        with pytest.raises(InputError, match=message):
            get_peft_model(load(base, **NF4), config)
    assert len(layers(model)) == 14


@pytest.mark.parametrize(
    ("kind", "optim"),
    [("nf4_double_bf16", "adamw_8bit"), ("int8", "paged_adamw_8bit"), ("nf4", "paged_adamw_32bit")],
)
def test_trained_verified_and_resumed(base: Path, tmp_path: Path, kind: str, optim: str) -> None:
    adapter = {"method": "lora", "r": 64, "target_modules": "all-linear"}  # 8-bit moments begin at 4,096 values
    folder = prepare_run(tmp_path / "run", base, adapter, quantization=KINDS[kind], optim=optim)
    result = worker.run(folder, console=Console(file=io.StringIO()))
    assert result is not None and result.difference == 0
    assert result.quantization == QuantizationSection(**KINDS[kind]).model_dump()
    assert json.loads((folder / "result.json").read_text(encoding="utf-8"))["quantization"] == result.quantization
    assert "| base in | " in (folder / "README.md").read_text(encoding="utf-8")
    moments = load_file(folder / "checkpoint-4" / "optimizer.safetensors")
    wanted = torch.uint8 if optim.endswith("8bit") else torch.float32
    assert {tensor.dtype for name, tensor in moments.items() if "up_proj" in name and "state1" in name} == {wanted}
    before = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").unlink()
    shutil.rmtree(folder / "checkpoint-4")
    worker.run(folder, resume="auto", console=Console(file=io.StringIO()))
    assert (folder / "adapter_model.safetensors").read_bytes() == before
