"""Adapters on bitsandbytes' 4- and 8-bit layers, on CPU: the base is never written to, a merge is never re-quantised."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from training.tiny import disturbed

from peftcli import LoraConfig, get_peft_model, replace_lora_weights_loftq

bnb = pytest.importorskip("bitsandbytes", reason="needs the quantization extra")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fake_quantize|.*MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

KINDS = ["nf4", "fp4", "nf4_double", "int8"]


def quantized(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    model = nn.Sequential()
    for module in plain:
        if isinstance(module, nn.Linear):
            model.append(quantize(module, kind))
        else:
            model.append(module)
    return model


def quantize(module: nn.Linear, kind: str) -> nn.Module:
    if kind == "int8":
        layer: Any = bnb.nn.Linear8bitLt(module.in_features, module.out_features, has_fp16_weights=False)
    else:
        quant_type, _, double = kind.partition("_")
        layer = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            compute_dtype=torch.float32,
            quant_type=quant_type,
            compress_statistics=bool(double),
        )
    layer.load_state_dict(module.state_dict())
    return layer.to("cpu")


X = torch.linspace(-1, 1, 192).reshape(3, 64)


def adapted(kind: str, **options: Any) -> Any:
    return disturbed(get_peft_model(quantized(kind), LoraConfig(**{"r": 4, "target_modules": ["0", "2"], **options})))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merged_is_adapted_and_unmerge_is_exact(kind: str, options: dict) -> None:
    model = adapted(kind, **options).eval()
    with torch.no_grad():
        expected = model(X)
        bare = quantized(kind).eval()(X)
        assert not torch.allclose(expected, bare, atol=1e-2)
        codes = model.base_model.model[0].base_layer.weight.data.clone()
        model.merge_adapter()
        tolerance = 0.02 if kind == "int8" else 1e-4  # LLM.int8 rounds its inputs to 8 bits as well
        torch.testing.assert_close(model(X), expected, atol=tolerance, rtol=0)
        model.unmerge_adapter()
        assert torch.equal(model.base_model.model[0].base_layer.weight.data, codes)
        assert torch.equal(model(X), expected)
        merged = model.merge_and_unload()
        assert type(merged[0]) is nn.Linear
        torch.testing.assert_close(merged(X), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_trained_and_the_base_is_not(kind: str) -> None:
    model = adapted(kind).train()
    before = copy.deepcopy(model.base_model.model[0].base_layer.weight.data)
    model(X).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.float32
            assert parameter.grad.abs().sum() > 0
    assert torch.equal(model.base_model.model[0].base_layer.weight.data, before)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4_double"])
def test_an_eval_forward_before_or_after_attaching_corrupts_nothing(kind: str) -> None:
    """bitsandbytes repacks 4-bit weights in place in eval mode on some CPUs; dequantising them then gives garbage."""
    base = quantized(kind).eval()
    clean = bnb.functional.dequantize_4bit(base[0].weight.data, base[0].weight.quant_state)
    with torch.no_grad():
        base(X)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"])).eval()
    layer = model.base_model.model[0]
    # repacking rounds the block scales to bfloat16 once
    torch.testing.assert_close(layer.site.weight(), clean, atol=0, rtol=1e-2)
    with torch.no_grad():
        model(X)
    again = layer.site.weight()
    torch.testing.assert_close(again, clean, atol=0, rtol=1e-2)


def test_a_start_from_the_base_works_on_quantised_weights() -> None:
    model = get_peft_model(quantized("nf4"), LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa")).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(X), quantized("nf4").eval()(X), atol=2e-2, rtol=0)


def test_loftq_on_a_base_that_is_quantised_already(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    model = get_peft_model(quantized("nf4"), LoraConfig(r=16, target_modules=["0", "2"])).eval()

    def error() -> float:
        with torch.no_grad():
            return float((model(X) - plain(X)).square().mean())

    start = error()
    errors = [start]

    def keep_if_better(current: nn.Module, name: str) -> bool:
        errors.append(error())
        return errors[-1] < min(errors[:-1])

    replace_lora_weights_loftq(model, tmp_path, callback=keep_if_better)
    assert error() == pytest.approx(min(errors))
    assert error() < 0.8 * start
    before = model.base_model.model[0].lora_A["default"].weight.clone()
    replace_lora_weights_loftq(model, tmp_path, callback=lambda *_: False)
    assert torch.equal(model.base_model.model[0].lora_A["default"].weight, before)
    with pytest.raises(ValueError, match="holds no safetensors"):
        replace_lora_weights_loftq(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="No bnb LoRA module"):
        replace_lora_weights_loftq(get_peft_model(plain, LoraConfig(target_modules=["0"])), tmp_path)
