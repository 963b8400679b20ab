"""LLaMA-Adapter: the top layers also attend to a learnt prompt (Zhang et al. 2023, arXiv 2303.16199).

y = attention(x) + W_o (g softmax(Q K'^T / sqrt(d)) V'), with K', V' the layer's keys and values of the prompt. The gate g
starts at 0, so a fresh adapter changes nothing and takes part only as it learns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftcli.adapters.base import SideAdapter, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.prompt_base import Size
from peftcli.errors import InputError, printable
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPES = ("llama", "mistral", "gpt2")


@dataclass
class AdaptionPromptConfig(TunerConfig):
    """LLaMA-Adapter's fields, as in PEFT.

    Attributes:
        target_modules: name of the attention modules.
        adapter_len: length of the prompt.
        adapter_layers: how many layers have one, counted from the top.
    """

    peft_type = "ADAPTION_PROMPT"
    prefix = "adaption_"
    absent = frozenset({"exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"})

    adapter_len: Size | None = None
    adapter_layers: Size | None = None

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):  # a name here, never an expression
            self.target_modules = [self.target_modules]
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        for field in ("adapter_len", "adapter_layers"):
            if getattr(self, field) is None:
                raise InputError("must be given", field=field, allowed="a number, e.g. 10")

    def check_model_type(self, model_type: str | None) -> None:
        if model_type not in MODEL_TYPES:
            raise InputError(
                f"Unsupported model type for adaption prompt: '{printable(model_type, 60)}'.",
                allowed=", ".join(MODEL_TYPES),
            )

    def narrowed(self, modules: list[str]) -> list[str]:
        layers = self.adapter_layers or 0
        if len(modules) < layers:
            raise InputError(
                f"Config specifies more adapter layers '{layers}' than the model has '{len(modules)}'.",
                field="adapter_layers",
            )
        return modules[len(modules) - layers :]

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        names = values["target_modules"]
        return values | {"target_modules": names[0] if names and len(names) == 1 else names}


class AdaptionPrompt(SideAdapter):
    """Attention over a learnt prompt, beside that over the text."""

    def tensors(self) -> dict[str, TensorSpec]:
        return {
            "adaption_prompt": TensorSpec((1, self.config.adapter_len, self.shape.in_features), "normal"),
            "adaption_gate": TensorSpec((1,), "zeros"),
        }

    def side(self, p: Tensors, module: Any, inputs: dict[str, Any]) -> Tensor:
        x = inputs["hidden_states"]
        prompt = p.adaption_prompt.to(x.dtype)
        if hasattr(module, "c_attn"):
            queries = _heads(module.c_attn(x).split(module.split_size, dim=2)[0], module)
            _, *pair = module.c_attn(prompt).split(module.split_size, dim=2)
            return self._attend(p, queries, *(_heads(states, module) for states in pair))
        queries = _rotated(_heads(module.q_proj(x), module), *inputs["position_embeddings"])
        keys, values = (_heads(project(prompt), module) for project in (module.k_proj, module.v_proj))
        mixed = module.o_proj(self._attend(p, queries, keys, values))
        bias = module.o_proj.bias
        return mixed if bias is None else mixed - bias  # the module's own output has it already

    def _attend(self, p: Tensors, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries [B, H, T, d] on keys and values [1, H_kv, L, d] -> [B, T, H d]. GPT-2 adds this without W_o, as in PEFT."""
        groups = queries.shape[1] // keys.shape[1]
        keys, values = (states.repeat_interleave(groups, dim=1) for states in (keys, values))
        scores = queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5
        weights = p.adaption_gate * torch.softmax(scores, dim=-1, dtype=torch.float32)
        return (weights.to(values.dtype) @ values).transpose(1, 2).flatten(2)


def _heads(states: Tensor, module: Any) -> Tensor:
    """[B, T, H d] -> [B, H, T, d]."""
    return states.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [B, H, T, d]."""
    first, second = states.chunk(2, dim=-1)
    return states * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)
