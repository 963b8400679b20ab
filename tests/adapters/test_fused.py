"""Module and update in one operation: the values and gradients of the plain formula, taken wherever it may be and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftcli import LoraConfig, get_peft_model

FUSED = "_LinearWithUpdateBackward"


class OneLayer(nn.Module):
    def __init__(self, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 16, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(dtype: torch.dtype = torch.float32, with_bias: bool = True, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], init_lora_weights=False, **settings)
    return get_peft_model(OneLayer(dtype, with_bias), config, autocast_adapter_dtype=dtype != torch.float64).train()


def operations(y: Tensor) -> set[str]:
    waiting, names = [y.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(node.name())
            waiting += [parent for parent, _ in node.next_functions]
    return names


def formula(model: nn.Module, x: Tensor, dora: bool) -> tuple[Tensor, list[Tensor]]:
    """The adapted layer written out in float64, and copies of what it trains."""
    layer = model.base_model.model.layer
    names = ["lora_A", "lora_B", *(["lora_magnitude_vector"] if dora else [])]
    leaves = [getattr(layer, name)["default"].weight.detach().double().requires_grad_() for name in names]
    weight = layer.base_layer.weight.double()
    adapted_weight = weight + 1.5 * leaves[1] @ leaves[0]
    if dora:
        adapted_weight = (leaves[2] / adapted_weight.detach().norm(dim=1))[:, None] * adapted_weight
    bias = layer.base_layer.bias
    return nn.functional.linear(x.double(), adapted_weight, None if bias is None else bias.double()), leaves


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-4), (torch.bfloat16, 2e-2)]
)
def test_values_and_gradients(dtype: torch.dtype, tolerance: float, dora: bool, bias: bool) -> None:
    model = adapted(dtype, bias, use_dora=dora)
    if dora:  # as after some training: a magnitude that is not the norm
        with torch.no_grad():
            model.base_model.model.layer.lora_magnitude_vector["default"].weight.mul_(1.3)
    x = torch.randn(2, 9, 24, dtype=dtype, requires_grad=True)
    upper = torch.randn(2, 9, 16, dtype=dtype)
    y = model(x)
    assert FUSED in operations(y)
    y.backward(upper)
    exact = x.detach().double().requires_grad_()
    reference, leaves = formula(model, exact, dora)
    reference.backward(upper.double())
    trained = [p for p in model.parameters() if p.requires_grad]
    pairs = [
        (y, reference),
        (x.grad, exact.grad),
        *zip((p.grad for p in trained), (t.grad for t in leaves), strict=True),
    ]
    for ours, theirs in pairs:
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
    with torch.no_grad():
        torch.testing.assert_close(model(x), y.detach())


def test_the_norm_follows_a_changed_base() -> None:
    model = adapted(with_bias=False, use_dora=True)
    x = torch.randn(3, 24)
    layer = model.base_model.model.layer.base_layer
    model(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(model(x).double(), formula(model, x, dora=True)[0], rtol=1e-5, atol=1e-5)
    layer.weight = nn.Parameter(torch.randn(16, 24), requires_grad=False)
    torch.testing.assert_close(model(x).double(), formula(model, x, dora=True)[0], rtol=1e-5, atol=1e-5)


def test_only_where_nothing_else_happens() -> None:
    """Dropout, biases of LoRA's own, a trained bias of the base, hooks and autocast take the long way."""
    x = torch.randn(3, 24)
    assert FUSED in operations(adapted()(x))
    assert FUSED not in operations(adapted(lora_dropout=0.5)(x))
    assert FUSED in operations(adapted(lora_dropout=0.5).eval()(x))
    assert FUSED not in operations(adapted(lora_bias=True)(x))
    assert FUSED not in operations(adapted(bias="lora_only")(x))
    hooked = adapted()
    hooked.base_model.model.layer.base_layer.register_forward_hook(lambda module, args, output: output * 2)
    assert FUSED not in operations(hooked(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert FUSED not in operations(adapted()(x))
    both = adapted()
    both.add_adapter("second", LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    both.base_model.set_adapter(["default", "second"])
    assert sum(name == FUSED for name in operations(both(x))) == 1
