"""LoRA on parameters that no linear layer holds: the fused experts of mixtures."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from peftcli import LoraConfig, PeftModel, get_peft_model

IDS = torch.arange(12).reshape(2, 6)


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:
                parameter.normal_(std=0.2)
    return model


class Mixture(nn.Module):
    """Three experts stored [experts, in, out], and a plain parameter."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 8, 6))
        self.gate = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("be,bi,eio->bo", (x @ self.gate.T).softmax(-1), x, self.up)


def config(*parameters: str, **options: object) -> LoraConfig:
    return LoraConfig(
        **{"r": 2, "target_modules": [], "target_parameters": list(parameters), "init_lora_weights": False, **options}
    )


EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
CASES = {
    "mixtral": (mixtral, config(*EXPERTS), IDS),
    "mixtral with attention": (mixtral, config(*EXPERTS, target_modules=["q_proj"]), IDS),
    "transposed": (lambda: nn.Sequential(Mixture()), config("0.up", "0.gate"), torch.randn(5, 8)),
}


def run(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return output.logits if hasattr(output, "logits") else output


@pytest.mark.parametrize("name", CASES)
def test_all_promises_hold(name: str, tmp_path: Path) -> None:
    build, settings, x = CASES[name]
    base = build()
    bare = run(base, x)
    model = get_peft_model(base, copy.deepcopy(settings)).eval()
    adapted = run(model, x)
    assert not torch.allclose(adapted, bare, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(run(model, x), bare)
    adapted.square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert dead == []
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(build(), tmp_path), x), adapted)
    model.merge_adapter()
    torch.testing.assert_close(run(model, x), adapted, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(run(model, x), adapted)
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged, x), adapted, atol=1e-5, rtol=1e-4)
    assert set(merged.state_dict()) == set(build().state_dict())


def test_a_fresh_adapter_changes_nothing_and_delete_leaves_no_trace() -> None:
    base = mixtral()
    bare = run(base, IDS)
    kinds = [type(module) for module in base.modules()]
    model = get_peft_model(base, config(*EXPERTS, init_lora_weights=True)).eval()
    torch.testing.assert_close(run(model, IDS), bare)
    model.delete_adapter("default")
    assert [type(module) for module in base.modules()] == kinds
    assert torch.equal(run(base, IDS), bare)


def test_the_keys_are_peft_s(tmp_path: Path) -> None:
    """Two parameters of one module are nested: the first one registered is the inner one."""
    get_peft_model(mixtral(), config(*EXPERTS)).save_pretrained(tmp_path)
    shapes = {key: tuple(t.shape) for key, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    experts = next(key for key in shapes if key.endswith("base_layer.lora_A.weight")).removesuffix(
        ".base_layer.lora_A.weight"
    )
    assert shapes == {
        f"{experts}.base_layer.lora_A.weight": (8, 16),
        f"{experts}.base_layer.lora_B.weight": (24, 8),
        f"{experts}.lora_A.weight": (8, 12),
        f"{experts}.lora_B.weight": (16, 8),
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_parameters": ["experts.nothing"]}, "experts.nothing"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "does not start fused experts"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        get_peft_model(mixtral(), config(*EXPERTS, **options))
