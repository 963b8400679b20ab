"""AdaLoRA: dW = s B (A * E), E [r, 1] the singular values of one update in SVD form (Zhang et al. 2023, arXiv 2303.10512).

Training begins with `init_r` triplets (a row of A, a column of B, a value of E) at each module and takes the least
important ones away until `target_r` a module are left on average: `rank_allocator.py`. Which ones lives in `lora_kept`;
files hold the kept ones only, and `rank_pattern` in the config tells where they stood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Lt

from peftcli.adapters.base import Adapter, Init, LowRankAdapter, Tensors, TensorSpec
from peftcli.adapters.config import PeftConfig, TunerConfig
from peftcli.adapters.methods.lora import LoraConfig, Rank
from peftcli.adapters.methods.lora_variants import VARIANTS
from peftcli.adapters.registry import Method
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Count = Annotated[int, Ge(0)]
Decay = Annotated[float, Gt(0), Lt(1)]
Weight = Annotated[float, Ge(0)] | Annotated[int, Ge(0)]


@dataclass
class AdaLoraConfig(LoraConfig):
    """AdaLoRA's fields, as in PEFT. Of LoRA's, `r`, `use_rslora` and `alpha_pattern` are not used.

    Attributes:
        init_r, target_r: triplets of a module at first, and on average in the end.
        tinit: optimizer steps before the budget begins to shrink.
        tfinal: steps at the end in which it stays as it is.
        deltaT: steps between two allocations.
        beta1, beta2: decay of the smoothed importance and of its uncertainty.
        orth_reg_weight: weight of the penalty that keeps A and B orthogonal.
        total_step: steps of the whole training; the training loop fills it in where it is None.
        rank_pattern: which triplets are left, by `<module>.lora_E`.
    """

    peft_type = "ADALORA"

    target_r: Rank = 8
    init_r: Rank = 12
    tinit: Count = 0
    tfinal: Count = 0
    deltaT: Annotated[int, Ge(1)] = 1
    beta1: Decay = 0.85
    beta2: Decay = 0.85
    orth_reg_weight: Weight = 0.5
    total_step: Annotated[int, Ge(1)] | None = None
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]

    def validate(self) -> None:
        TunerConfig.validate(self)
        plain = LoraConfig()
        for name in (*VARIANTS, "loftq_config", "lora_bias", "layer_replication", "target_parameters", "eva_config"):
            if getattr(self, name) != getattr(plain, name):
                raise InputError(f"ADALORA does not support `{name}`.", field=name)
        if not isinstance(self.init_lora_weights, bool):
            raise InputError("ADALORA starts in its own way", field="init_lora_weights", allowed="True, False")
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            raise InputError(
                "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or increase "
                "`total_step`.",
                field="total_step",
            )

    def begin_training(self, total_steps: int) -> None:
        if self.total_step is None:
            self.total_step = total_steps
            self.validate()

    def adapter_variant(self) -> Method | None:
        return None

    def follow_file(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Its rank_pattern is what training left; LoRA's is another."""

    def check_beside(self, others: list[PeftConfig]) -> None:
        if not self.inference_mode and any(isinstance(o, AdaLoraConfig) and not o.inference_mode for o in others):
            raise InputError(
                "AdaLoraModel supports only 1 trainable adapter. When using multiple adapters, set inference_mode to "
                "True for all adapters except the one you want to train.",
                field="inference_mode",
            )


class AdaLora(LowRankAdapter):
    """B (A * E), scaled."""

    config: AdaLoraConfig

    @cached_property
    def pattern(self) -> list[bool]:
        """Which of the first `init_r` triplets are still there."""
        stored = (self.config.rank_pattern or {}).get(f"{self.shape.name}.lora_E")
        return [True] * self.config.init_r if stored is None else stored

    @cached_property
    def r(self) -> int:
        return sum(self.pattern)

    @property
    def dropout(self) -> float:
        return self.config.lora_dropout

    def initial_scaling(self) -> float:
        return self.config.lora_alpha

    def tensors(self) -> dict[str, TensorSpec]:
        (out_features, in_features), r = self.shape.matrix, self.r
        start: Init = "empty" if self.config.init_lora_weights else "normal"
        shapes = {"lora_A": (r, in_features), "lora_B": (out_features, r), "lora_E": (r, 1)}
        specs = {name: TensorSpec(shape, start) for name, shape in shapes.items()}
        if self.config.inference_mode:
            return specs
        for name, shape in shapes.items():  # smoothed, for the allocator
            specs[f"{name}_importance"] = TensorSpec(shape, "zeros", trainable=False, saved=False)
            specs[f"{name}_uncertainty"] = TensorSpec(shape, "zeros", trainable=False, saved=False)
        specs["lora_kept"] = TensorSpec((r,), trainable=False, saved=False, dtype="bool")
        return specs

    def initialize(self, p: Tensors) -> Tensor | None:
        if self.config.init_lora_weights:
            for matrix in (p.lora_A, p.lora_B):
                matrix.normal_(std=0.02)
            p.lora_E.zero_()
        return self.regenerate(p)

    def regenerate(self, p: Tensors) -> Tensor | None:
        for key, spec in self.tensors().items():
            if not spec.saved:
                p[key].fill_(key == "lora_kept")
        return None

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        return p.lora_A * p.lora_E, p.lora_B * (self.scaling / (self.config.init_r + 1e-5))

    # -- training -------------------------------------------------------------------------------------------------

    @classmethod
    def regularization(cls, sites: list[tuple[Adapter, Tensors]], config: Any) -> Tensor | None:
        """The mean of |A A^T - I| and |B^T B - I| (Frobenius), weighted."""
        matrices = [matrix for _, p in sites for matrix in (p.lora_A, p.lora_B.mT) if matrix.shape[0]]
        if not matrices or not config.orth_reg_weight:
            return None
        distances = [
            (m @ m.mT - torch.eye(len(m), dtype=m.dtype, device=m.device)).norm().to(matrices[0].device)
            for m in matrices
        ]
        return config.orth_reg_weight * torch.stack(distances).mean()

    @classmethod
    def after_step(cls, sites: list[tuple[Adapter, Tensors]], config: Any, step: int) -> None:
        from peftcli.adapters.rank_allocator import allocate

        allocate([p for _, p in sites], config, step)
        config.rank_pattern = cls.stored_config(sites, config).rank_pattern

    # -- files ----------------------------------------------------------------------------------------------------

    @staticmethod
    def left(p: Tensors) -> Tensor:
        """The triplets [r] that do something or may again: those a file must hold."""
        return p.lora_kept | (p.lora_E != 0).flatten()

    def stored(self, p: Tensors) -> dict[str, Tensor]:
        if "lora_kept" not in p:
            return super().stored(p)
        left = self.left(p)
        return {"lora_A": p.lora_A[left], "lora_B": p.lora_B[:, left], "lora_E": p.lora_E[left]}

    @classmethod
    def stored_config(cls, sites: list[tuple[Adapter, Tensors]], config: Any) -> Any:
        """The config with the places of the triplets that `stored` gives, among the first `init_r`."""
        patterns = {}
        for adapter, p in sites:
            assert isinstance(adapter, AdaLora)
            left = iter(cls.left(p).tolist() if "lora_kept" in p else [True] * adapter.r)
            patterns[f"{adapter.shape.name}.lora_E"] = [there and next(left) for there in adapter.pattern]
        complete = all(all(pattern) for pattern in patterns.values())
        return replace(config, rank_pattern=None if complete else patterns)
