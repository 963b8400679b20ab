"""FRoD: whose basis a module uses, and what follows from the file's basis."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peftcli import FrodConfig, PeftModel, get_peft_model
from peftcli.adapters.base import SiteShape
from peftcli.adapters.methods.frod import Frod
from peftcli.errors import InputError


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("model.layers.3.self_attn.q_proj", "self_attn_q_proj"),
        ("bert.encoder.layer.1.attention.output.dense", "attention_output"),
        ("bert.encoder.layer.1.output.dense", "output_dense"),
        ("layers.0", "layers_0"),
        ("blocks.0.fc", "fc"),
        ("head", "head"),
    ],
)
def test_role(path: str, role: str) -> None:
    assert Frod(FrodConfig(), SiteShape(path, "linear", 8, 8)).role == role


def stack(*sizes: tuple[int, int]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(*size)}) for size in sizes)
    model.forward = lambda x: model.layers[1]["fc"](torch.tanh(model.layers[0]["fc"](x)))  # type: ignore[method-assign]
    return model


def test_modules_of_one_role_share_one_basis() -> None:
    model = get_peft_model(stack((12, 12), (12, 12)), FrodConfig(target_modules=["fc"], sparse_rate=0.1))
    first, second = (layer.tensors("default") for _, layer in model.base_model.attached.layers())
    assert first["frod_V.fc"] is second["frod_V.fc"]
    assert not torch.equal(first.frod_U, second.frod_U)


def test_one_role_with_two_input_sizes_is_refused() -> None:
    with pytest.raises(InputError, match="has not the 12 inputs of other modules called fc"):
        get_peft_model(stack((12, 8), (8, 4)), FrodConfig(target_modules=["fc"]))


def test_also_where_modules_of_one_role_claim_one_layer() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(12, 8)), nn.Sequential(nn.Linear(8, 4)))
    with pytest.raises(InputError, match="has not the 12 inputs of other modules called 0"):
        get_peft_model(net, FrodConfig(target_modules=["0.0", "1.0"]))


def test_another_basis_in_the_file(tmp_path: Path) -> None:
    """Where the decomposition came out otherwise (its vectors' signs are free), U must belong to the file's V."""
    model = get_peft_model(stack((12, 12), (12, 12)), FrodConfig(target_modules=["fc"], sparse_rate=0.1)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "frod_lambda" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(5, 12)
    expected = model(x)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    signs = torch.ones(12)
    signs[::2] = -1
    row, column = tensors["base_model.frod_s_indices.fc"]
    for key in tensors:
        if "frod_V" in key:
            tensors[key] = tensors[key] * signs
        elif "s_values" in key:
            tensors[key] = tensors[key] * signs[row] * signs[column]
    save_file(tensors, path)
    again = PeftModel.from_pretrained(stack((12, 12), (12, 12)), tmp_path).eval()
    torch.testing.assert_close(again(x), expected, atol=1e-4, rtol=1e-4)
