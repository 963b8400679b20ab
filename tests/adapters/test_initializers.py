"""Starts that are taken out of the base weight: what they promise about the base, the start and the saved form."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training.tiny import disturbed

from peftcli import (
    CordaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
)
from peftcli.adapters.initializers.corda import corda
from peftcli.adapters.initializers.eva import IncrementalPCA
from peftcli.adapters.initializers.loftq import loftq, normal_float_levels, quantize_dequantize
from peftcli.adapters.initializers.olora import olora
from peftcli.adapters.initializers.pissa import pissa
from peftcli.errors import InputError

FROM_BASE = ["pissa", "pissa_niter_16", "olora"]


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8))


X = torch.linspace(-1, 1, 72).reshape(3, 24)


def config(init: str | bool, **options: object) -> LoraConfig:
    return LoraConfig(target_modules=["0", "2"], init_lora_weights=init, **{"r": 4, "lora_alpha": 6, **options})


def test_pissa_is_the_best_approximation_of_its_rank() -> None:
    weight = torch.randn(16, 24) * torch.tensor([10.0, 8, 6, 4] + [0.5] * 12)[:, None]
    a, b = pissa(weight, 4, scaling=1.5)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(1.5 * b @ a, (u[:, :4] * s[:4]) @ vh[:4])
    quick_a, quick_b = pissa(weight, 4, scaling=1.5, iterations=20)
    torch.testing.assert_close(quick_b @ quick_a, b @ a, atol=1e-3, rtol=1e-3)


def test_olora_starts_orthonormal() -> None:
    weight = torch.randn(16, 24)
    a, b = olora(weight, 4, scaling=1.0)
    torch.testing.assert_close(b.T @ b, torch.eye(4))
    torch.testing.assert_close(b @ (b.T @ weight), b @ a, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", FROM_BASE)
@pytest.mark.parametrize("rslora", [False, True])
def test_saved_as_plain_lora_of_twice_the_rank(init: str, rslora: bool, tmp_path: Path) -> None:
    options = {"use_rslora": rslora, "rank_pattern": {"2": 2}, "alpha_pattern": {"0": 3}}
    model = disturbed(get_peft_model(base(), config(init, **options)))
    expected = model(X)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["init_lora_weights"] is True
    assert (written["r"], written["rank_pattern"]) == (8, {"2": 4})
    again = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(again(X), expected)


@pytest.mark.parametrize("init", FROM_BASE)
def test_the_base_stays_as_it_was(init: str) -> None:
    """Another adapter beside it, and the bare base, are right: nothing was written over the weight."""
    model = disturbed(get_peft_model(base(), config(init)))
    with model.disable_adapter():
        assert torch.equal(model(X), base()(X))
    model.add_adapter("plain", config(True))
    model.set_adapter("plain")
    assert torch.equal(model(X), base()(X))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_raw_file_of_another_tool_gets_its_start_from_the_base(init: str, tmp_path: Path) -> None:
    """PEFT writes A and B with `init_lora_weights: pissa` and takes the start out of the base when it loads them."""
    model = disturbed(get_peft_model(base(), config(init)))
    expected = model(X)
    raw = config(init)
    raw.save_pretrained(tmp_path)
    from safetensors.torch import save_file

    tensors = {
        f"base_model.model.{path}.{slot.key}": tensor.detach().clone()
        for path, layer in model.base_model.attached.layers()
        for slot, tensor in layer.own_tensors("default")
        if slot.spec.saved
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path)(X), expected)


def test_a_start_needs_a_rank_the_weight_has() -> None:
    with pytest.raises(ValueError, match="rank 12"):
        get_peft_model(base(), config("pissa", r=12))
    with pytest.raises(ValueError, match="rank 12"):
        loftq(torch.ones(8, 16), 12, 1.0, bits=4, iterations=1)
    with pytest.raises(ValueError, match="rank 12"):
        corda(torch.ones(8, 16), torch.eye(16), 12, 1.0, "ipm")


@pytest.mark.parametrize(("bits", "levels"), [(2, 4), (4, 16), (8, 256)])
def test_normal_float_levels(bits: int, levels: int) -> None:
    values = normal_float_levels(bits)
    assert values.shape == (levels,)
    assert values.min() == -1
    assert values.max() == 1
    assert 0 in values
    assert torch.equal(values, values.sort().values)
    weight = torch.randn(7, 33)
    once = quantize_dequantize(weight, bits)
    torch.testing.assert_close(quantize_dequantize(once, bits), once)


def test_nf4_is_qlora_s() -> None:
    """The sixteen values printed in appendix E of the QLoRA paper (2305.14314)."""
    printed = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    printed += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    printed += [
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
    torch.testing.assert_close(normal_float_levels(4), torch.tensor(printed), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("alpha", [4, 6])
def test_loftq_comes_closer_than_quantising_alone(bits: int, alpha: int, tmp_path: Path) -> None:
    model = get_peft_model(
        base(), config("loftq", lora_alpha=alpha, loftq_config={"loftq_bits": bits, "loftq_iter": 3})
    )
    weight = base()[0].weight
    layer = model.base_model.model[0]
    with torch.no_grad():
        ours = (layer.effective()[0] - weight).norm()
        alone = (quantize_dequantize(weight, bits) - weight).norm()
    assert ours < 0.9 * alone
    torch.testing.assert_close(quantize_dequantize(layer.base_layer.weight, bits), layer.base_layer.weight.detach())
    disturbed(model).save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path)(X), model(X))


def test_loftq_needs_its_settings() -> None:
    with pytest.raises(ValueError, match="loftq_config"):
        get_peft_model(base(), config("loftq"))
    with pytest.raises(ValueError, match="loftq_bits"):
        LoraConfig.from_dict({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}, "target_modules": ["0"]})


def test_loftq_with_more_iterations_is_no_worse() -> None:
    weight = torch.randn(32, 64)

    def error(iterations: int) -> float:
        q, a, b = loftq(weight, 4, 1.0, 4, iterations)
        return float((weight - q - b @ a).norm())

    assert error(5) <= error(1) * 1.001


# -- starts from data -----------------------------------------------------------------------------------------------


def batches(count: int = 6) -> list[torch.Tensor]:
    """Inputs that lie close to a plane, so that principal components mean something."""
    generator = torch.Generator().manual_seed(2)
    plane = torch.randn(2, 24, generator=generator)
    noise = [torch.randn(40, 24, generator=generator) * 0.05 for _ in range(count)]
    return [torch.randn(40, 2, generator=generator) @ plane + n for n in noise]


def test_incremental_components_are_those_of_all_rows_at_once() -> None:
    pca = IncrementalPCA(3)
    for rows in batches():
        pca.update(rows)
    everything = torch.cat(batches())
    _, s, vh = torch.linalg.svd(everything - everything.mean(0), full_matrices=False)
    assert pca.components is not None
    torch.testing.assert_close((pca.components[:2] * vh[:2]).sum(1).abs(), torch.ones(2), atol=1e-3, rtol=0)
    ratio = s[:2] ** 2 / (s**2).sum()
    torch.testing.assert_close(pca.explained_variance_ratio()[:2], ratio, atol=1e-2, rtol=0)


def test_eva_starts_in_the_inputs_plane_and_deals_out_its_budget(tmp_path: Path) -> None:
    model = get_peft_model(base(), config("eva", r=3))
    initialize_lora_eva_weights(model, batches())
    assert torch.equal(model(X), base()(X)), "B is zero: nothing changes at the start"
    written = model.peft_config["default"]
    assert sum(written.rank_pattern.values()) == 6
    first = model.base_model.model[0]
    everything = torch.cat(batches())
    _, _, vh = torch.linalg.svd(everything - everything.mean(0), full_matrices=False)
    inside = first.lora_A["default"].weight[:2] @ vh[:2].T
    torch.testing.assert_close(inside.norm(dim=1), torch.ones(2), atol=0.02, rtol=0)
    assert first.scaling["default"] == pytest.approx(6 / 3)
    disturbed(model).save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path)(X), model(X))


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_changes_nothing_at_the_start_and_is_saved_as_plain_lora(method: str, tmp_path: Path) -> None:
    settings = config("corda", corda_config=CordaConfig(method))
    model = base()
    preprocess_corda(model, settings, lambda: [model(x) for x in batches()])
    peft = get_peft_model(model, settings)
    torch.testing.assert_close(peft(X), base()(X))
    start = peft.base_model.model[0].tensors("default")
    plain = peft.base_model.model[0].base_layer.weight
    inputs = torch.cat(batches())
    kept = inputs @ (1.5 * start.lora_B_start @ start.lora_A_start).T
    share = kept.norm() / (inputs @ plain.T).norm()
    assert share > 0.9 if method == "ipm" else share < 0.3
    disturbed(peft).save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path)(X), peft(X))


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_starts_in_the_gradient_and_changes_nothing(direction: str, scale: str, tmp_path: Path) -> None:
    settings = config("lora_ga", r=2, lora_ga_config=LoraGAConfig(direction, scale))
    model = base()

    def step() -> None:
        model(batches()[0]).square().sum().backward()

    step()
    gradient = model[0].weight.grad.clone()
    model.zero_grad()
    preprocess_loraga(model, settings, step)
    assert model[0].weight.grad is None
    peft = get_peft_model(model, settings)
    torch.testing.assert_close(peft(X), base()(X))
    a = peft.base_model.model[0].lora_A["default"].weight
    _, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    inside = (a @ vh[:4].T).norm(dim=1) / a.norm(dim=1)
    torch.testing.assert_close(inside, torch.ones(2), atol=1e-2, rtol=0)
    disturbed(peft).save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path)(X), peft(X))


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_a_start_from_data_can_t_be_guessed(init: str) -> None:
    with pytest.raises(ValueError, match="comes from data"):
        get_peft_model(base(), config(init))


def test_mica_trains_a_against_the_minor_directions_of_the_base(tmp_path: Path) -> None:
    """B: the left singular vectors of the r smallest singular values, by their defining property; and it stays."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(12, 8))
    weight = net[0].weight.detach().clone()
    model = get_peft_model(copy.deepcopy(net), LoraConfig(target_modules=["0"], r=3, init_lora_weights="mica"))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "base_model.model.0.lora_A.default.weight"
    }
    tensors = get_peft_model_state_dict(model)
    b = tensors["base_model.model.0.lora_B.weight"]
    vectors = torch.linalg.eigh(weight @ weight.T).eigenvectors  # of ascending eigenvalues
    torch.testing.assert_close(b @ b.T, vectors[:, :3] @ vectors[:, :3].T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(torch.eye(12)), net(torch.eye(12)))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).normal_()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(net, tmp_path)(torch.eye(12)), model(torch.eye(12)))
    with pytest.raises(InputError, match="mica"):
        get_peft_model(
            torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3)), LoraConfig(target_modules=["0"], init_lora_weights="mica")
        )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init_lora_weights": "unknown"}, "init_lora_weights: 'unknown' is not accepted"),
        ({"bias": "some"}, "bias: 'some' is not accepted"),
        ({"r": "8"}, "r: '8' is not accepted"),
        ({"lora_dropout": 2.0}, "lora_dropout: 2.0 is not accepted"),
    ],
)
def test_a_config_made_in_python_is_checked_field_by_field(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"], **fields))
