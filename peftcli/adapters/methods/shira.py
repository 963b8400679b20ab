"""SHiRA: dW is sparse: as many entries as a LoRA of rank r has, at random places, are trained (Bhardwaj et al. 2024,
arXiv 2406.13175).

The places are stored beside the values, so nothing depends on a seed once an adapter is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftcli.adapters.base import DeltaAdapter, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig, later, runtime
from peftcli.adapters.methods.lora import Rank
from peftcli.adapters.methods.vera import Seed
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class ShiraConfig(TunerConfig):
    """SHiRA's fields, as in PEFT, and the choice of layers that other methods have.

    Attributes:
        r: r (in + out) entries of each module are trained.
        mask_type: how places are chosen: `random`, or a name for what `mask_fn` does.
        random_seed: seed of the places; every module of one shape gets the same ones.
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        init_weights: True (no change at first) or False (random: for tests).
        mask_fn: chooses the places instead: called with a module, r and `random_seed`, it gives a mask of 0 and 1 of the
            shape [out, in] of the module's weight with r (out + in) ones. Files hold the places, so it is not saved.
    """

    peft_type = "SHIRA"
    prefix = "shira_"

    r: Rank = 32
    mask_type: str = "random"
    random_seed: Seed | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = later(None, since="0.21")
    layers_pattern: list[str] | str | None = later(None, since="0.21")
    mask_fn: Callable[..., Any] | None = runtime(None)


class Shira(DeltaAdapter):
    """Values at places."""

    config: ShiraConfig

    def tensors(self) -> dict[str, TensorSpec]:
        count, room = self.config.r * sum(self.shape.matrix), self.shape.matrix[0] * self.shape.matrix[1]
        if count > room:
            raise InputError(
                f"The set rank {self.config.r} results in more shira params than the total number of params in the "
                f"base layer {room} and this is not allowed.",
                place=self.shape.name,
                field="r",
            )
        return {
            "shira_weight": TensorSpec((count,), "zeros" if self.config.init_weights else "normal"),
            "shira_indices": TensorSpec((2, count), trainable=False, dtype="int32"),
        }

    def initialize(self, p: Tensors) -> Tensor | None:
        out_features, in_features = self.shape.matrix
        if self.config.mask_fn is not None or self.config.mask_type != "random":
            p.shira_indices.copy_(self._places(p.shira_indices.shape[1]))
            return None
        generator = torch.Generator()  # with torch's own fixed seed where none is given
        if self.config.random_seed is not None:
            generator.manual_seed(self.config.random_seed)
        chosen = torch.randperm(out_features * in_features, generator=generator)[: len(p.shira_weight)].sort().values
        p.shira_indices.copy_(torch.stack([chosen // in_features, chosen % in_features]))
        return None

    def _places(self, count: int) -> Tensor:
        """Where the mask of `mask_fn` is 1, [2, count]."""
        config, (out_features, in_features) = self.config, self.shape.matrix
        if config.mask_fn is None:
            raise InputError(
                f"{config.mask_type!r} is no mask peftcli makes",
                field="mask_type",
                allowed="random",
                fix="set config.mask_fn to a function that makes it",
            )
        module = torch.nn.Linear(in_features, out_features, bias=False, device="meta")
        module.weight = torch.nn.Parameter(self.weight(), requires_grad=False)
        mask = torch.as_tensor(config.mask_fn(module, config.r, random_seed=config.random_seed))
        if mask.shape != self.shape.matrix or not ((mask == 0) | (mask == 1)).all() or int(mask.sum()) != count:
            raise InputError(
                f"its mask has the shape {list(mask.shape)} and the sum {mask.sum().item():g}",
                place=self.shape.name,
                field="mask_fn",
                allowed=f"{count} ones and else zeros of the shape {list(self.shape.matrix)}",
            )
        return mask.nonzero().T

    def restored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        sizes = torch.tensor(self.shape.matrix).unsqueeze(1)
        places = tensors["shira_indices"].cpu()
        if (places < 0).any() or (places >= sizes).any():
            raise InputError("holds places outside of the weight", place=self.shape.name, field="shira_indices")
        return tensors

    def delta(self, p: Tensors) -> Tensor:
        return self.merged_weight(p, p.shira_weight.new_zeros(self.shape.matrix))

    def merged_weight(self, p: Tensors, weight: Tensor) -> Tensor:
        rows, columns = p.shira_indices.long()
        values = (p.shira_weight * self.scaling).to(weight.dtype)
        return weight.index_put((rows, columns), values, accumulate=True)
