"""VB-LoRA: dW = B A, both tiled from one bank of vectors the whole model shares (Li et al. 2024, arXiv 2405.15179).

Each tile of a row of A or a column of B is a mixture of the k bank vectors with the largest logits, weighted by softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from peftcli.adapters.base import Adapter, LowRankAdapter, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.methods.loha import Probability
from peftcli.adapters.methods.lora import Rank
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

LOGITS = ("vblora_logits_A", "vblora_logits_B")


@dataclass
class VBLoRAConfig(TunerConfig):
    """VB-LoRA's fields, as in PEFT.

    Attributes:
        r: rank.
        num_vectors, vector_length: shape of the bank; the length must divide both sides of every adapted module.
        topk: how many vectors a tile mixes.
        save_only_topk_weights: store the choice and its weights instead of all logits: far smaller, and final.
        vblora_dropout: dropout on the input of the adapter's path.
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        bias: which biases are trained: `none`, those of adapted modules (`vblora_only`), or `all`.
        init_vector_bank_bound: the bank starts uniform in plus or minus this.
        init_logits_std: the logits start normal with this deviation.
    """

    peft_type = "VBLORA"
    prefix = "vblora_"

    r: Rank = 4
    num_vectors: Annotated[int, Ge(1)] = 256
    vector_length: Annotated[int, Ge(1)] = 256
    topk: Annotated[int, Ge(1)] = 2
    save_only_topk_weights: bool = False
    vblora_dropout: Probability = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vblora_only"] = "none"
    init_vector_bank_bound: float | int = 0.02
    init_logits_std: float | int = 0.1

    def validate(self) -> None:
        super().validate()
        if self.topk > self.num_vectors:
            raise InputError(f"is {self.topk}, more than the {self.num_vectors} vectors of the bank", field="topk")


class FinalChoiceError(InputError, RuntimeError):
    """Training of an adapter whose file holds the chosen vectors only (PEFT raises a RuntimeError)."""


class VBLoRA(LowRankAdapter):
    """B A of tiles from the bank."""

    config: VBLoRAConfig
    choice_is_final = False

    @property
    def dropout(self) -> float:
        return self.config.vblora_dropout

    @cached_property
    def tiles(self) -> tuple[int, int]:
        """How many vectors make a column of B and a row of A."""
        length = self.config.vector_length
        for name, size in zip(("out_features", "in_features"), self.shape.matrix, strict=True):
            if size % length:
                raise InputError(
                    f"`{name}` {size} must be divisible by `vector_length` {length}",
                    place=self.shape.name,
                    field="vector_length",
                )
        return self.shape.matrix[0] // length, self.shape.matrix[1] // length

    def tensors(self) -> dict[str, TensorSpec]:
        (out_tiles, in_tiles), r, count = self.tiles, self.config.r, self.config.num_vectors
        return {
            "vblora_logits_A": TensorSpec((r, in_tiles, count)),
            "vblora_logits_B": TensorSpec((out_tiles, r, count)),
            "vblora_vector_bank": TensorSpec((count, self.config.vector_length), shared=True),
        }

    def initialize(self, p: Tensors) -> Tensor | None:
        for name in LOGITS:
            p[name].normal_(std=self.config.init_logits_std)
        return None

    @classmethod
    def make_shared(cls, adapters: list[Adapter], config: Any) -> dict[str, Tensor]:
        bound = config.init_vector_bank_bound
        bank = torch.empty(config.num_vectors, config.vector_length).uniform_(-bound, bound)
        return {"vblora_vector_bank": bank}

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        a, b = (self._mixed(p[name], p.vblora_vector_bank) for name in LOGITS)
        return a.flatten(1), b.mT.flatten(0, 1) * self.scaling

    def _mixed(self, logits: Tensor, bank: Tensor) -> Tensor:
        """The tiles [..., vector_length] that logits [..., num_vectors] choose."""
        largest, chosen = logits.topk(self.config.topk)
        return (largest.softmax(-1).unsqueeze(-1) * bank[chosen]).sum(-2)

    # -- the small file -------------------------------------------------------------------------------------------

    def file_tensors(self) -> dict[str, TensorSpec]:
        if not self.config.save_only_topk_weights:
            return super().file_tensors()
        specs = {}
        for name, spec in super().file_tensors().items():
            *tiles, _ = spec.shape
            specs[f"{name}_topk_indices"] = TensorSpec((*tiles, self.config.topk), dtype=self._index_type())
            specs[f"{name}_topk_weights"] = TensorSpec((*tiles, self.config.topk - 1))
        return specs

    def _index_type(self) -> str:
        sizes = {"uint8": 8, "int16": 15, "int32": 31}
        return next((name for name, bits in sizes.items() if self.config.num_vectors < 1 << bits), "int64")

    def stored(self, p: Tensors) -> dict[str, Tensor]:
        if not self.config.save_only_topk_weights:
            return super().stored(p)
        held = {}
        for name in LOGITS:
            largest, chosen = p[name].topk(self.config.topk)
            held[f"{name}_topk_indices"] = chosen.to(getattr(torch, self._index_type()))
            held[f"{name}_topk_weights"] = largest.softmax(-1)[..., :-1]  # they sum to 1: the last is not needed
        return held

    def restored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Logits whose softmax over the chosen vectors gives the stored weights; minus infinity for all others."""
        if not self.config.save_only_topk_weights:
            return tensors
        logits = {}
        for name in LOGITS:
            chosen, weights = (tensors[f"{name}_topk_{part}"] for part in ("indices", "weights"))
            if chosen.min() < 0 or chosen.max() >= self.config.num_vectors:
                raise InputError(
                    f"{name}_topk_indices name vectors outside of the bank", place=self.shape.name, field="num_vectors"
                )
            last = (1 - weights.sum(-1, keepdim=True)).clamp_min(0)
            weights = torch.cat([weights, last], -1)
            full = weights.new_full((*weights.shape[:-1], self.config.num_vectors), float("-inf"))
            logits[name] = full.scatter(-1, chosen.long(), weights.log())
        self.choice_is_final = True
        return logits

    def dropped(self, p: Tensors) -> Tensors:
        if self.choice_is_final:
            raise FinalChoiceError(
                "Found infinity values in VB-LoRA logits. Ensure training was not resumed from a "
                "`save_only_topk_weights` model.",
                place=self.shape.name,
            )
        return p
