"""AdaLoRA: the budget, the choice of triplets, files that hold the chosen ones, the term in the loss."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peftcli import AdaLoraConfig, PeftModel, get_peft_model
from peftcli.adapters.rank_allocator import budget


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 8)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        y = self.second(torch.relu(self.first(x)))
        return SimpleNamespace(logits=y, loss=None if labels is None else ((y - labels) ** 2).mean())


def config(**options: Any) -> AdaLoraConfig:
    settings = {"init_r": 6, "target_r": 3, "total_step": 20, "tinit": 3, "tfinal": 5, **options}
    return AdaLoraConfig(target_modules=["first", "second"], **settings)


def train(model: PeftModel, steps: range) -> list[int]:
    """Steps of SGD as PEFT's documentation writes them; the triplets at work after each."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    ranks = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, labels = (torch.randn(16, size, generator=generator) for size in (12, 8))
        model(x, labels=labels).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        layers = [layer for _, layer in model.base_model.attached.layers()]
        ranks.append(sum(int((layer.lora_E["default"] != 0).sum()) for layer in layers))
    return ranks


def test_budget_shrinks_along_a_cubic_between_warm_up_and_the_final_steps() -> None:
    found = [budget(config(), 12, 2, step) for step in range(1, 21)]
    assert found[:3] == [12, 12, 12]
    assert found[3:15] == [int(6 * (1 - k / 12) ** 3 + 6) for k in range(1, 13)]
    assert found[14:] == [6] * 6


@pytest.mark.parametrize("delta", [1, 3])
def test_ranks_follow_the_budget_and_end_at_the_target(delta: int) -> None:
    model = get_peft_model(Net(), config(deltaT=delta))
    ranks = train(model, range(1, 21))
    due = [step for step in range(1, 21) if (3 < step < 15 and step % delta == 0) or step >= 15]
    assert [ranks[step - 1] for step in due] == [budget(config(), 12, 2, step) for step in due]
    pattern = model.peft_config["default"].rank_pattern
    assert sum(sum(kept) for kept in pattern.values()) == 6
    assert [len(kept) for kept in pattern.values()] == [6, 6]


@pytest.mark.parametrize("steps", [2, 8, 9, 20])
def test_file_holds_what_is_left_and_computes_the_same(steps: int, tmp_path: Path) -> None:
    model, x = get_peft_model(Net(), config(deltaT=3)), torch.randn(4, 12)
    ranks = train(model, range(1, steps + 1))
    model.eval().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    sizes = [tensors[f"base_model.model.{site}.lora_E"].shape[0] for site in ("first", "second")]
    assert sum(sizes) == ranks[-1]
    if sizes == [6, 6]:  # between two allocations all may have come back
        assert told["rank_pattern"] is None
    else:
        assert [sum(told["rank_pattern"][f"{site}.lora_E"]) for site in ("first", "second")] == sizes
    again = PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(again(x).logits, model(x).logits, atol=1e-6, rtol=1e-5)
    again.save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_trimmed_adapter_can_be_trained_and_trimmed_again(tmp_path: Path) -> None:
    model = get_peft_model(Net(), config())
    train(model, range(1, 21))
    model.save_pretrained(tmp_path / "one")
    again = PeftModel.from_pretrained(Net(), tmp_path / "one", is_trainable=True)
    again.peft_config["default"].target_r = 2
    train(again, range(1, 21))
    again.eval().save_pretrained(tmp_path / "two")
    pattern = json.loads((tmp_path / "two" / "adapter_config.json").read_text())["rank_pattern"]
    assert [len(kept) for kept in pattern.values()] == [6, 6]
    assert sum(sum(kept) for kept in pattern.values()) == 4
    x = torch.randn(4, 12)
    last = PeftModel.from_pretrained(Net(), tmp_path / "two")
    torch.testing.assert_close(last(x).logits, again(x).logits, atol=1e-6, rtol=1e-5)


def test_penalty_is_the_distance_from_orthogonality() -> None:
    model, x, labels = get_peft_model(Net(), config(orth_reg_weight=0.25)), torch.randn(4, 12), torch.randn(4, 8)
    with torch.no_grad():
        bare = model.eval()(x, labels=labels).loss
    layers = [layer for _, layer in model.base_model.attached.layers()]
    distances = [
        (m @ m.T - torch.eye(6)).norm()
        for layer in layers
        for m in (layer.lora_A["default"], layer.lora_B["default"].T)
    ]
    expected = bare + 0.25 * sum(distances) / 4
    torch.testing.assert_close(model.train()(x, labels=labels).loss, expected)


def test_misuse_is_told() -> None:
    with pytest.raises(ValueError, match="don't allow for a budgeting phase"):
        get_peft_model(Net(), config(total_step=8))
    with pytest.raises(ValueError, match="ADALORA does not support `use_dora`"):
        get_peft_model(Net(), config(use_dora=True))
    model = get_peft_model(Net(), config(total_step=None))
    with pytest.raises(ValueError, match="does not work when `total_step` is None"):
        model.base_model.update_and_allocate(1)
    with pytest.raises(ValueError, match="no gradient"):
        get_peft_model(Net(), config()).base_model.update_and_allocate(1)
    with pytest.raises(ValueError, match="supports only 1 trainable adapter"):
        model.add_adapter("other", config())
    model.add_adapter("other", config(inference_mode=True))
