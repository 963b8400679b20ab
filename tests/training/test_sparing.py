"""What is made again in the backward pass: the same gradients, from less that is kept."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftcli import LNTuningConfig, LoraConfig, get_peft_model
from peftcli.adapters.remade import origin, remade
from peftcli.training.losses import CausalLMLoss
from peftcli.training.sparing import is_gated, sparing
from training.test_losses import assert_same, gradients
from training.test_unpadded import SIZES
from training.tiny import random_batch, tiny_model, trainer

MODELS: list[tuple[str, dict[str, Any], float]] = [
    ("llama", {}, 0.8),
    ("qwen3", {"head_dim": 8}, 0.85),
    ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8}, 0.9),
    ("phi3", {}, 0.98),  # gate and up in one: only the activation is made again
    ("gpt_neox", {}, 0.95),
]


def step(model: nn.Module, batch: dict[str, Tensor], *, spare: bool) -> tuple[dict[str, Tensor], int]:
    """The gradients of a batch, and the bytes kept between the two passes."""
    loss, kept = CausalLMLoss(model), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no other takes its place
        return tensor

    with sparing(model) if spare else nullcontext():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = loss(batch)
        value.backward()
    loss.release()
    return gradients(model), sum(size for place, (size, _) in kept.items() if place not in weights)


def adapted(model_type: str, config: Any = None, **extra: Any) -> nn.Module:
    config = config or LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(tiny_model(model_type, **{**SIZES, **extra}), config).train()


@pytest.mark.parametrize(
    ("model_type", "extra", "most"), MODELS, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 2e-2)])
def test_same_gradients_from_less(
    model_type: str, extra: dict[str, Any], most: float, dtype: torch.dtype, tolerance: float
) -> None:
    model = adapted(model_type, **extra).to(dtype)
    batch = random_batch(rows=4, length=13)
    expected, kept = step(model, batch, spare=False)
    ours, spared = step(model, batch, spare=True)
    assert_same(ours, expected, tolerance)
    assert spared <= most * kept


def test_trained_norms_get_their_gradients() -> None:
    model = adapted("llama", LNTuningConfig(target_modules=["input_layernorm", "norm"]))
    batch = random_batch(rows=3, length=9)
    expected, ours = step(model, batch, spare=False)[0], step(model, batch, spare=True)[0]
    assert expected
    assert_same(ours, expected, 1e-5)


def test_the_loop_spares_and_tidies_up(tmp_path: Path) -> None:
    model = adapted("llama")
    forwards = []

    def look(module: nn.Module, *_: Any) -> None:
        forwards.append("forward" in vars(module))

    norm = model.get_submodule("base_model.model.model.norm")
    norm.register_forward_hook(look)
    trainer(tmp_path, model, max_steps=1).train()
    assert any(forwards)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_backward_pass_may_be_repeated() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4)
    y = remade(lambda x: (x * x).sin() * weight, x)
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(first, (x * x).cos() * 2 * x * weight)
    assert torch.equal(first, again)


def test_changed_in_place() -> None:
    """An output that was changed is no longer made as it was; an input that was changed is autograd's to refuse."""
    x = torch.randn(3, requires_grad=True)
    y = remade(torch.sin, x)
    assert origin(y) is not None
    y.mul_(2)
    assert origin(y) is None
    inner = x * 1
    y = remade(torch.sin, inner)
    inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Other(nn.Module):
    """Has the parts of a gated product, and adds them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(2, 2) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class Gated(Other):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_a_gated_product_is_known_by_what_it_does() -> None:
    assert is_gated(Gated())
    assert not is_gated(Other())
    assert not is_gated(SimpleNamespace())
