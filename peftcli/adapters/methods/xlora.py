"""X-LoRA: a gate weighs trained LoRAs, token by token and layer by layer (Buehler & Buehler 2024, arXiv 2402.07148).

y = W x + b + sum over experts e of g[token, layer, e] B_e A_e x, with g = gate(h) and h the last hidden states of a first
pass in which all weights are `scaling_pass_value`. `gate.py` runs the two passes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Le

from peftcli.adapters.config import CONFIG_NAME, PeftConfig
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

Size = Annotated[int, Ge(1), Le(1 << 20)]


@dataclass
class XLoraConfig(PeftConfig):
    """X-LoRA's fields, as in PEFT.

    Attributes:
        hidden_size: size of the base's hidden states; taken from the base when None.
        adapters: the experts: a name and a folder or hub id for each. Those saved beside the gate are taken first.
        enable_softmax: the experts' weights of a token sum to one.
        enable_softmax_topk: the same over the `top_k_lora` best experts, after the others were left out.
        layerwise_scalings: each layer gets weights of its own; False gives all layers the same.
        xlora_depth: linear layers of the gate.
        xlora_size: width between them.
        xlora_dropout_p: dropout between them.
        use_trainable_adapters: train the experts too; they are saved beside the gate then.
        softmax_temperature: divides the gate's logits.
        top_k_lora: how many experts a token gets; all when None.
        scaling_pass_value: weight of every expert in the first pass.
        global_scaling_weight: factor on all weights.
    """

    peft_type = "XLORA"
    prefix = "internal_xlora_classifier"

    hidden_size: Size | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: Annotated[int, Ge(1), Le(100)] = 1
    xlora_size: Size = 2048
    xlora_dropout_p: Annotated[float, Ge(0), Le(1)] = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: Annotated[float, Gt(0)] = 1.0
    top_k_lora: Size | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0

    def validate(self) -> None:
        super().validate()
        if self.enable_softmax_topk and self.top_k_lora is None:
            raise InputError("needs `top_k_lora`", field="enable_softmax_topk")
        if self.top_k_lora is not None and self.top_k_lora > len(self.adapters) > 0:
            raise InputError(f"is {self.top_k_lora} of {len(self.adapters)} adapters", field="top_k_lora")

    def locate(self, folder: Path, experts: dict[str, str] | None) -> None:
        """Point at the experts the caller names, else at those saved beside the gate in `folder`."""
        if experts:
            self.adapters = dict(experts)
            return
        for name, path in self.adapters.items():
            near = [place for place in (folder / name, folder / path) if (place / CONFIG_NAME).is_file()]
            if near:
                self.adapters[name] = str(near[0])


class XLora:
    """The gate's network and the meaning of its outputs.

    Args:
        config: the gate's config.
        layers: how many adapted modules there are.
    """

    def __init__(self, config: XLoraConfig, layers: int) -> None:
        self.config, self.layers, self.experts = config, layers, len(config.adapters)

    def linear_layers(self) -> dict[int, tuple[int, int]]:
        """(inputs, outputs) of each linear layer, by its place in the network. Needs no torch."""
        config = self.config
        step = 3 if config.xlora_dropout_p > 0 else 2  # ReLU and dropout stand between
        inputs = [config.hidden_size or 0, *[config.xlora_size] * (config.xlora_depth - 1)]
        outputs = [*inputs[1:], self.experts * (self.layers if config.layerwise_scalings else 1)]
        return {place * step: sizes for place, sizes in enumerate(zip(inputs, outputs, strict=True))}

    def network(self) -> nn.Sequential:
        """Hidden states [..., hidden] -> logits [..., experts], or [..., layers * experts]."""
        nn, sizes = torch.nn, self.linear_layers()
        parts: list[nn.Module] = []
        for place in range(max(sizes) + 1):
            if place in sizes:
                parts.append(nn.Linear(*sizes[place]))
            else:
                parts.append(nn.ReLU() if place - 1 in sizes else nn.Dropout(self.config.xlora_dropout_p))
        return nn.Sequential(*parts)

    def scalings(self, logits: Tensor) -> Tensor:
        """What the gate predicts, [B, T, layers, experts]."""
        if self.config.layerwise_scalings:
            scalings = logits.unflatten(-1, (self.layers, self.experts))
        else:
            scalings = logits.unsqueeze(-2).expand(-1, -1, self.layers, -1)
        return torch.softmax(scalings / self.config.softmax_temperature, -1) if self.config.enable_softmax else scalings

    def weights(self, scalings: Tensor) -> Tensor:
        """What the experts' updates are multiplied by, [B, T, layers, experts]."""
        count = self.config.top_k_lora
        if count is not None:
            best = torch.topk(scalings, count, dim=-1)
            kept = torch.softmax(best.values, -1) if self.config.enable_softmax_topk else best.values
            scalings = torch.zeros_like(scalings).scatter(-1, best.indices, kept)
        return scalings * self.config.global_scaling_weight
