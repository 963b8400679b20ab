"""LN tuning: y = norm'(x), the normalisation layers trained in full (Zhao et al. 2023, arXiv 2312.11420)."""

from __future__ import annotations

from dataclasses import dataclass

from peftcli.adapters.base import CopyAdapter, CopyNames, TensorSpec
from peftcli.adapters.config import TunerConfig


@dataclass
class LNTuningConfig(TunerConfig):
    """LN tuning has no fields of its own; `target_modules` may name modules of any type."""

    peft_type = "LN_TUNING"
    prefix = "ln_tuning_"
    absent = frozenset({"layers_to_transform", "layers_pattern"})


class LnTuning(CopyAdapter):
    """A copy of each norm."""

    names = CopyNames(
        "base_layer",
        "ln_tuning_layers",
        saved="ln_tuning_layers.",
        what="LN tuning",
        wrapper="ln_tuning.LNTuningLayer",
    )

    def tensors(self) -> dict[str, TensorSpec]:
        features = (self.shape.out_features,)
        names = ["weight", "bias"] if self.shape.has_bias else ["weight"]
        return {f"{self.names.saved}{name}": TensorSpec(features) for name in names}
