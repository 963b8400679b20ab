"""Uni-LoRA: all numbers of all A and B are those of one short learnt vector, spread by a random isometry (Li et al. 2025,
arXiv 2506.00799).

Each entry of the vector goes to equally many places, divided by the root of their number. Places come from a seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from peftcli.adapters.base import Adapter, LowRankAdapter, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.methods.loha import Probability
from peftcli.adapters.methods.lora import Rank
from peftcli.adapters.methods.vera import Seed
from peftcli.errors import InputError
from peftcli.lazy import numpy, torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class UniLoraConfig(TunerConfig):
    """Uni-LoRA's fields, as in PEFT.

    Attributes:
        r: rank.
        proj_seed: seed of the places.
        theta_d_length: length of the vector: all there is to learn.
        unilora_dropout: dropout on the input of the adapter's path.
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        bias: which biases are trained: `none`, those of adapted modules (`unilora_only`), or `all`.
        init_theta_d_bound: the vector starts uniform in plus or minus this.
        init_weights: False starts it from a standard normal distribution.
        save_indices: store the places and factors; otherwise they are made again from the seed.
    """

    peft_type = "UNILORA"
    prefix = "unilora_"

    r: Rank = 4
    proj_seed: Seed = 42
    theta_d_length: Annotated[int, Ge(1), Le(1 << 30)] = 256
    unilora_dropout: Probability = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "unilora_only"] = "none"
    init_theta_d_bound: Annotated[float, Gt(0)] | Annotated[int, Gt(0)] = 0.02
    init_weights: bool = True
    save_indices: bool = False


class UniLora(LowRankAdapter):
    """B A, both read from the vector."""

    config: UniLoraConfig
    knows_neighbours = True
    first = 0
    """How many numbers of A and B stand at modules before this one."""
    total: int | None = None
    """How many there are in the model."""

    @classmethod
    def arrange(cls, adapters: list[Any]) -> None:
        total = 0
        for adapter in adapters:
            adapter.first = total
            total += adapter.count
        for adapter in adapters:
            adapter.total = total

    @property
    def count(self) -> int:
        """How many numbers A and B have here."""
        return self.config.r * sum(self.shape.matrix)

    @property
    def dropout(self) -> float:
        return self.config.unilora_dropout

    def tensors(self) -> dict[str, TensorSpec]:
        (out_features, in_features), r = self.shape.matrix, self.config.r
        a, b = (
            TensorSpec(shape, trainable=False, saved=self.config.save_indices)
            for shape in ((r, in_features), (out_features, r))
        )
        return {
            "unilora_theta_d": TensorSpec((self.config.theta_d_length,), shared=True),
            "unilora_indices_A": replace(a, dtype="int64"),
            "unilora_indices_B": replace(b, dtype="int64"),
            "unilora_scales_A": a,
            "unilora_scales_B": b,
        }

    @classmethod
    def make_shared(cls, adapters: list[Adapter], config: Any) -> dict[str, Tensor]:
        theta, bound = torch.empty(config.theta_d_length), config.init_theta_d_bound
        return {"unilora_theta_d": theta.uniform_(-bound, bound) if config.init_weights else theta.normal_()}

    def initialize(self, p: Tensors) -> Tensor | None:
        return self.regenerate(p)

    def regenerate(self, p: Tensors) -> Tensor | None:
        if self.total is None:
            raise InputError("Uni-LoRA's places depend on all modules it adapts", place=self.shape.name)
        places, scales = spread(self.total, self.config.theta_d_length, self.config.proj_seed)
        sizes = [len(p.unilora_indices_A.flatten()), len(p.unilora_indices_B.flatten())]
        for name, here in zip("AB", places[self.first : self.first + self.count].split(sizes), strict=True):
            p[f"unilora_indices_{name}"].copy_(here.reshape(p[f"unilora_indices_{name}"].shape))
            p[f"unilora_scales_{name}"].copy_(scales[here].reshape(p[f"unilora_scales_{name}"].shape))
        return None

    def restored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in ("unilora_indices_A", "unilora_indices_B"):
            places = tensors.get(name)
            if places is not None and (places.min() < 0 or places.max() >= self.config.theta_d_length):
                raise InputError("holds places outside of the vector", place=self.shape.name, field=name)
        return tensors

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        a, b = (p.unilora_theta_d[p[f"unilora_indices_{name}"]] * p[f"unilora_scales_{name}"] for name in "AB")
        return a, b * self.scaling


@lru_cache(maxsize=1)
def spread(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which of `length` numbers stands at each of `count` places [count], and the factor on each number [length].

    Drawn by NumPy's generator, step by step as in PEFT.
    """
    generator = numpy.random.default_rng(seed)
    places = numpy.repeat(numpy.arange(length), count // length)
    if count % length:
        places = numpy.concatenate([places, generator.choice(length, size=count % length, replace=False)])
    generator.shuffle(places)
    uses = numpy.bincount(places, minlength=length)
    return torch.from_numpy(places), torch.from_numpy(uses).clamp_min(1).float().rsqrt()
