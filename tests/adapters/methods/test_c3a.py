"""C3A: the circulant blocks, and gradients that are right also for what comes before (PEFT's are not)."""

from __future__ import annotations

import torch
from torch import nn

from peftcli import C3AConfig, get_peft_model


def test_a_block_is_its_kernel_moved_row_by_row() -> None:
    model = get_peft_model(nn.ModuleDict({"site": nn.Linear(8, 4)}), C3AConfig(target_modules=["site"], block_size=4))
    layer = model.get_base_model()["site"]
    kernel, delta = layer.c3a_kernel["default"][0], layer.adapters["default"].delta(layer.tensors("default"))
    for block in range(2):
        for row in range(4):
            torch.testing.assert_close(delta[row, 4 * block : 4 * block + 4], kernel[block].roll(row) / 8)


def test_gradients_through_two_layers_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8))
    model = get_peft_model(base, C3AConfig(target_modules=["0", "2"], block_size=4)).double()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def output(x: torch.Tensor, *kernels: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, kernels, strict=True)), (x,))

    kernels = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(output, (x, *kernels))
