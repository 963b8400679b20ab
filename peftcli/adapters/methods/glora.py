"""GLoRA: W' = W + W * A + B and b' = b + b * D + E + W C, each of A to E a low-rank product, a vector, a number or
nothing (Chavan et al. 2023, arXiv 2306.07967)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peftcli.adapters.base import DeltaAdapter, Init, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig, later
from peftcli.adapters.methods.lora import Rank

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class GloraConfig(TunerConfig):
    """GLoRA's fields, as in PEFT, and the choice of layers that other methods have.

    Attributes:
        r: rank of low-rank products.
        bias: which biases are trained as well: `none`, those of adapted modules (`glora_only`), or `all`.
        config_A_B: what A and B are: `lora` (a product), `vector` (a number for each output), `constant` or `none`.
        config_C: the same for C; its `vector` has a number for each input.
        config_D_E: the same for D and E. A module without a bias has no C, D and E.
        init_weights: True (no change at first) or False (random: for tests).
    """

    peft_type = "GLORA"
    prefix = "glora_"

    r: Rank = 8
    bias: Literal["none", "all", "glora_only"] = "none"
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"
    config_C: Literal["lora", "vector", "none"] = "lora"
    config_D_E: Literal["vector", "constant", "none"] = "constant"
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = later(None, since="0.21")
    layers_pattern: list[str] | str | None = later(None, since="0.21")


class Glora(DeltaAdapter):
    """W * A + B, and what goes to the bias."""

    kinds = frozenset({"linear"})
    config: GloraConfig

    def tensors(self) -> dict[str, TensorSpec]:
        out_features, in_features = self.shape.matrix
        config, has_bias = self.config, self.shape.has_bias
        bias_c, bias_d = (config.config_C, config.config_D_E) if has_bias else ("none", "none")
        specs: dict[str, TensorSpec] = {}
        for name in "AB":
            specs |= self._support(name, config.config_A_B, (out_features, in_features), (out_features, 1))
        specs |= self._support("C", bias_c, (in_features, 1), (in_features, 1))
        for name in "DE":
            specs |= self._support(name, bias_d, (out_features,), (out_features,))
        return specs

    def _support(self, name: str, kind: str, shape: tuple[int, ...], vector: tuple[int, ...]) -> dict[str, TensorSpec]:
        """The tensors of one of A to E. PEFT stores zeros for one that is nothing."""
        key = f"glora_{name}"
        if kind == "none":
            return {f"{key}.zeros": TensorSpec(shape, "zeros", trainable=False)}
        start: Init = "zeros" if self.config.init_weights else "normal"
        if kind == "lora":
            down = TensorSpec((shape[0], self.config.r), start)
            return {f"{key}.Xd": down, f"{key}.Xu": TensorSpec((self.config.r, shape[1]), "kaiming")}
        return {f"{key}.X": TensorSpec(vector if kind == "vector" else (1,), start)}

    @staticmethod
    def _value(p: Tensors, name: str) -> Tensor | None:
        """One of A to E, or None where it is nothing; it may have to be broadcast."""
        key = f"glora_{name}"
        if f"{key}.Xd" in p:
            return p[f"{key}.Xd"] @ p[f"{key}.Xu"]
        return p.get(f"{key}.X")

    def delta(self, p: Tensors) -> Tensor:
        change = next(iter(p.values())).new_zeros(self.shape.matrix)
        a, b = self._value(p, "A"), self._value(p, "B")
        if a is not None:
            change = change + self.weight().to(a.dtype) * a
        if b is not None:
            change = change + b
        return change * self.scaling

    def merged_bias(self, p: Tensors, bias: Tensor) -> Tensor:
        c, d, e = (self._value(p, name) for name in "CDE")
        change = bias.new_zeros(bias.shape) if d is None else bias * d
        if e is not None:
            change = change + e
        if c is not None:
            change = change + (self.weight().to(c.dtype) @ c).squeeze(-1)
        return bias + change * self.scaling
