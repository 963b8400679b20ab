"""VeRA: projections made from a seed, shared by adapters, stored or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peftcli import PeftModel, VeraConfig, get_peft_model, inject_adapter_in_model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(10, 20), nn.Linear(20, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def config(**options: object) -> VeraConfig:
    return VeraConfig(target_modules=["first", "second"], r=4, init_weights=False, **options)


def test_projections_are_as_large_as_the_largest_module_and_follow_the_seed() -> None:
    projections = get_peft_model(Net(), config()).base_model.vera_A["default"]
    assert projections.shape == (4, 20)
    torch.manual_seed(1)  # the global state plays no part
    assert torch.equal(get_peft_model(Net(), config()).base_model.vera_A["default"], projections)
    other = get_peft_model(Net(), config(projection_prng_key=1)).base_model.vera_A["default"]
    assert not torch.equal(other, projections)


def test_adapters_share_one_copy_and_must_agree_on_it() -> None:
    model = get_peft_model(Net(), config())
    model.add_adapter("other", config())
    layer = model.base_model.model.first
    assert layer.vera_A["default"].data_ptr() == layer.vera_A["other"].data_ptr()
    with pytest.raises(
        ValueError, match=r"key must be the same for all adapters\. Got config\.projection_prng_key=5 but"
    ):
        model.add_adapter("third", config(projection_prng_key=5))
    with pytest.raises(ValueError, match="must be saved for all adapters or none"):
        model.add_adapter("third", config(save_projection=False))
    assert list(model.peft_config) == ["default", "other"]


def test_a_file_without_projections_gives_the_same_model(tmp_path: Path) -> None:
    model, x = get_peft_model(Net(), config(save_projection=False)).eval(), torch.randn(3, 10)
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "vera_A" in key]
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path)(x), model(x))


def test_projections_of_a_file_are_used_and_leave_another_adapter_alone(tmp_path: Path) -> None:
    model, x = get_peft_model(Net(), config()).eval(), torch.randn(3, 10)
    before = model(x)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.vera_A"] += 1.0
    save_file(tensors, path)
    model.load_adapter(tmp_path, "changed")
    assert torch.equal(model(x), before)
    model.set_adapter("changed")
    assert not torch.allclose(model(x), before)
    del tensors["base_model.vera_A"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"base_model\.vera_A"):
        PeftModel.from_pretrained(Net(), tmp_path)


@pytest.mark.parametrize("wrap", [True, False])
def test_projections_move_with_the_model(wrap: bool) -> None:
    model = get_peft_model(Net(), config()) if wrap else inject_adapter_in_model(config(), Net())
    output = model.double()(torch.randn(3, 10, dtype=torch.float64))
    assert output.dtype == torch.float64
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float64}


@pytest.mark.parametrize("version", ["0.13.0", "0.21.2"])
def test_projections_are_pefts_bit_for_bit(shared: Path, version: str) -> None:
    tensors = load_file(shared / "golden" / f"peft-{version}" / "vera" / "adapter" / "adapter_model.safetensors")
    model = nn.ModuleDict({"first": nn.Linear(64, 64), "second": nn.Linear(64, 32)})
    made = get_peft_model(model, VeraConfig(r=16, target_modules=["first", "second"])).base_model
    assert torch.equal(made.vera_A["default"], tensors["base_model.vera_A"])
    assert torch.equal(made.vera_B["default"], tensors["base_model.vera_B"])
