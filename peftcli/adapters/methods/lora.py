"""LoRA: dW = s B A with s = alpha / r (Hu et al. 2021, arXiv 2106.09685), or alpha / sqrt(r) for rsLoRA (2312.03732)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from peftcli.adapters.base import LowRankAdapter
from peftcli.adapters.config import TunerConfig, later
from peftcli.adapters.targets import pattern_value

if TYPE_CHECKING:
    pass

Rank = Annotated[int, Ge(1), Le(1 << 20)]


@dataclass
class LoraConfig(TunerConfig):
    """LoRA's fields, as in PEFT.

    Attributes:
        r: rank.
        lora_alpha: numerator of the scaling.
        lora_dropout: dropout on the input of the adapter's path.
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        bias: which biases are trained: `none`, those of adapted modules (`lora_only`), or `all`.
        use_rslora: scale by alpha / sqrt(r).
        init_lora_weights: True (A Kaiming uniform, B zero), False (both random: for tests), `gaussian`, `orthogonal`.
        rank_pattern, alpha_pattern: r or alpha by module name or regular expression, where they differ.
        lora_bias: give lora_B a bias.
    """

    peft_type = "LORA"
    prefix = "lora_"

    r: Rank = 8
    lora_alpha: Annotated[float, Gt(0)] | Annotated[int, Gt(0)] = 8
    lora_dropout: Annotated[float, Ge(0), Le(1)] = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    rank_pattern: dict[str, Rank] = field(default_factory=dict)
    alpha_pattern: dict[str, Annotated[float, Gt(0)] | Annotated[int, Gt(0)]] = field(default_factory=dict)
    megatron_config: None = None
    megatron_core: str | None = "megatron.core"
    loftq_config: dict[str, Any] = field(default_factory=dict)
    use_dora: Literal[False] = False
    layer_replication: None = None
    lora_bias: bool = later(False, since="0.14")


class Lora(LowRankAdapter):
    """B A, scaled."""

    config: LoraConfig

    @property
    def r(self) -> int:
        return pattern_value(self.config.rank_pattern, self.shape.name, self.config.r)

    @property
    def alpha(self) -> float:
        return pattern_value(self.config.alpha_pattern, self.shape.name, self.config.lora_alpha)

    @property
    def dropout(self) -> float:
        return self.config.lora_dropout

    def initial_scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.config.use_rslora else self.r)
