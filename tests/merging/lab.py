"""Tiny models and adapters of any method on them, saved as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training.tiny import tiny_llama

from peftcli import PeftModel, get_peft_model
from peftcli.adapters.layer import AdapterLayer
from peftcli.adapters.registry import config_class

IDS = torch.arange(2, 14).reshape(2, 6)


def save_base(folder: Path, **fields: Any) -> Path:
    """A random llama of 2 layers, hidden size 16, written as a model's folder."""
    base(**fields).save_pretrained(folder)
    return folder


def base(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return tiny_llama(**{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **fields}).eval()


def adapt(model: nn.Module, method: str = "LORA", *, seed: int = 1, size: float = 0.2, **fields: Any) -> PeftModel:
    """A model with an adapter all of whose tensors are random."""
    fields = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields}
    adapted = get_peft_model(model, config_class(method)(**fields))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    return adapted.eval()


def save_adapter(folder: Path, base_folder: Path, method: str = "LORA", **fields: Any) -> Path:
    """A random adapter's folder."""
    model = load_base(base_folder)
    adapt(model, method, **{"base_model_name_or_path": str(base_folder), **fields}).save_pretrained(folder)
    return folder


def load_base(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def load(base_folder: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(load_base(base_folder), adapter).eval()


def deltas(base_folder: Path, adapter: Path) -> dict[str, Tensor]:
    """What an adapter adds to each weight [out, in], computed by the live model."""
    model = load(base_folder, adapter)
    found = {}
    with torch.no_grad():
        for path, layer in model.attached.layers():
            assert isinstance(layer, AdapterLayer)
            weight = layer.site.weight()
            found[path] = layer.effective(["default"])[0] - weight
    return found


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def total(*parts: tuple[float, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Weighted sum of updates by module."""
    names = {name for _, part in parts for name in part}
    return {name: sum(weight * part[name] for weight, part in parts if name in part) for name in names}  # type: ignore[misc]


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(
            found[name], wanted[name], atol=atol, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
