"""TinyLoRA: dW = B (sum_i v_i P_i) A: of the weight's r largest singular parts a short learnt vector v makes, with random
P_i [r, r], a small update; modules may share v (Morris et al. 2026, arXiv 2602.04118).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from peftcli.adapters.base import Adapter, LowRankAdapter, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.methods.loha import Probability
from peftcli.adapters.methods.lora import Rank
from peftcli.adapters.methods.vera import Seed
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class TinyLoraConfig(TunerConfig):
    """TinyLoRA's fields, as in PEFT.

    Attributes:
        r: how many singular parts; fewer where a module has no more.
        u: length of v.
        weight_tying: 0 gives every module its own v, 1 gives all the same.
        projection_seed: seed of the P_i; each module has its own ones.
        save_projection: store the P_i; otherwise they are made again from the seed.
        init_v_bound: v starts uniform in plus or minus this, if it starts random.
        tinylora_dropout: dropout on the input of the adapter's path.
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        bias: which biases are trained: `none`, those of adapted modules (`tinylora_only`), or `all`.
        init_weights: True (no change at first), or `uniform` (False is the same; PEFT leaves v unset then).
    """

    peft_type = "TINYLORA"
    prefix = "tinylora_"

    r: Rank = 2
    u: Annotated[int, Ge(1), Le(1 << 20)] = 64
    weight_tying: Probability = 0.0
    projection_seed: Seed = 42
    save_projection: bool = True
    init_v_bound: Annotated[float, Gt(0)] | Annotated[int, Gt(0)] = 0.02
    tinylora_dropout: Probability = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "tinylora_only"] = "none"
    init_weights: bool | Literal["uniform"] = True


class TinyLora(LowRankAdapter):
    """B R A with R from v."""

    kinds = frozenset({"linear"})
    knows_neighbours = True
    config: TinyLoraConfig
    index: int | None = None
    """Which of the adapted modules this is, in the model's order."""
    group = 0
    """Which v it has."""

    @classmethod
    def arrange(cls, adapters: list[Any]) -> None:
        count = len(adapters)
        for index, adapter in enumerate(adapters):
            groups = max(1, round(count * (1 - adapter.config.weight_tying)))
            adapter.index, adapter.group = index, min(index // max(1, count // groups), groups - 1)

    @property
    def r(self) -> int:
        return min(self.config.r, *self.shape.matrix)

    @property
    def dropout(self) -> float:
        return self.config.tinylora_dropout

    def tensors(self) -> dict[str, TensorSpec]:
        (out_features, in_features), r, u = self.shape.matrix, self.r, self.config.u
        return {
            f"tinylora_v.{self.group}": TensorSpec((u,), shared=True),
            "tinylora_A": TensorSpec((r, in_features), trainable=False),
            "tinylora_B": TensorSpec((out_features, r), trainable=False),
            "tinylora_P": TensorSpec((u, r, r), trainable=False, saved=self.config.save_projection),
        }

    @classmethod
    def make_shared(cls, adapters: list[Adapter], config: Any) -> dict[str, Tensor]:
        names = [key for adapter in adapters for key, spec in adapter.tensors().items() if spec.shared]
        bound = 0 if config.init_weights is True else config.init_v_bound
        return {name: torch.empty(config.u).uniform_(-bound, bound) for name in dict.fromkeys(names)}

    def initialize(self, p: Tensors) -> Tensor | None:
        u, s, vh = torch.linalg.svd(self.weight().float(), full_matrices=False)
        half = s[: self.r].sqrt()
        p.tinylora_A.copy_(half[:, None] * vh[: self.r])
        p.tinylora_B.copy_(u[:, : self.r] * half)
        return self.regenerate(p)

    def regenerate(self, p: Tensors) -> Tensor | None:
        """The P_i from the seed, on the CPU whatever the device: the same numbers as in PEFT."""
        generator = torch.Generator().manual_seed(self.config.projection_seed + self._place())
        p.tinylora_P.copy_(torch.normal(0.0, self.r**-0.5, p.tinylora_P.shape, generator=generator))
        return None

    def _place(self) -> int:
        if self.index is None:
            raise InputError("what TinyLoRA does here depends on all modules it adapts", place=self.shape.name)
        return self.index

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        self._place()
        inner = torch.einsum("u,urs->rs", p[f"tinylora_v.{self.group}"], p.tinylora_P)
        return inner @ p.tinylora_A * self.scaling, p.tinylora_B
