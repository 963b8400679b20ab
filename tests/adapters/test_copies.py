"""Modules trained in full: as a method (LN tuning) and beside one (modules_to_save)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peftcli import LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from peftcli.errors import InputError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.norm(x)))


def tuned(*targets: str) -> PeftModel:
    model = get_peft_model(Block().eval(), LNTuningConfig(target_modules=list(targets))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    return model


def test_only_the_copies_are_trained() -> None:
    model = tuned("norm")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    inside = "base_model.model.norm.ln_tuning_layers.default"
    assert trained == {f"{inside}.weight", f"{inside}.bias"}


def test_a_copy_of_any_module_keeps_its_buffers(tmp_path: Path) -> None:
    model = tuned("body")
    model.train()(torch.randn(4, 8))
    model.eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Block().eval(), tmp_path)
    x = torch.randn(4, 8)
    assert torch.equal(again(x), model(x))
    assert not torch.equal(model.base_model.model.body.active[1].running_mean, torch.zeros(8))


def test_mixed_batches_are_refused_where_rows_depend_on_each_other() -> None:
    model = tuned("body")
    with pytest.raises(InputError, match="Mixed batching is not supported for Sequential in LN tuning"):
        model(torch.randn(2, 8), adapter_names=["default", "__base__"])


def test_merged_copies_answer_until_unmerged() -> None:
    model = tuned("norm")
    model.add_adapter("other", LNTuningConfig(target_modules=["norm"]))
    x = torch.randn(2, 8)
    expected = model(x)
    model.merge_adapter(["other"])
    assert not torch.equal(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("other")
    assert not torch.equal(model(x), expected)


def test_modules_left_behind_have_the_precision_of_the_base() -> None:
    """Copies are trained in fp32; a bf16 model that is given one back must still run."""
    model = get_peft_model(
        Block().to(torch.bfloat16).eval(), LoraConfig(target_modules=["0"], modules_to_save=["head"])
    )
    assert model.base_model.model.head.modules_to_save["default"].weight.dtype == torch.float32
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert merged(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_module_is_trained_in_full_by_one_entry_only() -> None:
    base = Block()
    with pytest.raises(InputError, match="adapted and also trained in full"):
        get_peft_model(base, LNTuningConfig(target_modules=["norm"], modules_to_save=["norm"]))
    assert type(base.norm) is nn.LayerNorm
    with pytest.raises(InputError, match="LN tuning cannot be applied to modules of type ModuleList"):
        get_peft_model(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), LNTuningConfig(target_modules=["0"]))


def test_all_biases_of_a_copy_are_stored_twice_and_read(tmp_path: Path) -> None:
    """As PEFT does: the bias of a module trained in full once as its own and once as the copy's."""
    model = get_peft_model(Block(), LoraConfig(target_modules=["0"], modules_to_save=["head"], bias="all")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.head.modules_to_save.bias"], stored["base_model.model.head.bias"])
    x = torch.randn(4, 8)
    assert torch.equal(PeftModel.from_pretrained(Block(), tmp_path)(x), model(x))
