"""LoRA's config: its own fields, and those that choose a start (`initializers`) or a variant (`lora_variants.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Len
from pydantic import Field

from peftcli.adapters.config import TunerConfig, build_nested, later, runtime
from peftcli.adapters.initializers import takes_start_from_base
from peftcli.adapters.initializers.corda import CordaConfig
from peftcli.adapters.initializers.eva import EvaConfig
from peftcli.adapters.initializers.lora_ga import LoraGAConfig
from peftcli.adapters.keys import PREFIX
from peftcli.adapters.methods.lora_variants import (
    SETTINGS,
    VARIANTS,
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peftcli.adapters.methods.trainable_tokens import TokenIndex, tokens_beside
from peftcli.adapters.old_patterns import follow_old_patterns
from peftcli.adapters.registry import Method
from peftcli.errors import InputError

Range = Annotated[list[Annotated[int, Ge(0)]], Len(2, 2)]
Rank = Annotated[int, Ge(1), Le(1 << 20)]
Alpha = Annotated[float, Gt(0)] | Annotated[int, Gt(0)]
Init = (
    bool
    | Literal["gaussian", "orthogonal", "mica", "pissa", "olora", "loftq", "eva", "corda", "lora_ga"]
    | Annotated[str, Field(pattern=r"^pissa_niter_[0-9]{1,3}$")]
)


@dataclass
class LoftQConfig:
    """How LoftQ quantises.

    Attributes:
        loftq_bits: 2, 4 or 8.
        loftq_iter: alternations between quantising and approximating.
    """

    loftq_bits: Literal[2, 4, 8] = 4
    loftq_iter: Annotated[int, Ge(1), Le(100)] = 1


@dataclass
class LoraRuntimeConfig:
    """Settings of the running process, never saved.

    Attributes:
        ephemeral_gpu_offload: accepted: DoRA's norm is computed where the weights are, without building W + B A.
    """

    ephemeral_gpu_offload: bool = False


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
        use_dora: split the weight into magnitude and direction (`dora.py`).
        init_lora_weights: True (A Kaiming uniform, B zero), False (both random: for tests), `gaussian`, `orthogonal`,
            `mica` (B the base's minor singular vectors, and not trained: Minor Component Adaptation, arXiv 2604.01694),
            or a start taken from the base (`pissa`, `pissa_niter_<n>`, `olora`, `loftq`) or from data (`eva`, `corda`,
            `lora_ga`): see `initializers`.
        loftq_config, eva_config, corda_config, lora_ga_config: settings of those.
        trainable_token_indices: rows of the input embedding (or of each module named) to train as well.
        target_parameters: weights adapted although no linear layer holds them (fused experts), by their name's ending.
        layer_replication: (start, end) ranges of the base's layers a deeper model is built of (see `surgery`).
        rank_pattern, alpha_pattern: r or alpha by module name or regular expression, where they differ.
        lora_bias: give lora_B a bias.
        alora_invocation_tokens: token ids from whose last occurrence on the adapter acts (`alora.py`).
        runtime_config: settings of the running process.
        use_bdlora, kasa_config, monteclora_config, velora_config: another equation, and its settings (`lora_variants.py`).
    """

    peft_type = "LORA"
    prefix = "lora_"
    inert_keys = frozenset({"qalora_group_size"})

    r: Rank = 8
    lora_alpha: Alpha = 8
    lora_dropout: Annotated[float, Ge(0), Le(1)] = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    init_lora_weights: Init = True
    rank_pattern: dict[str, Rank] = field(default_factory=dict)
    alpha_pattern: dict[str, Alpha] = field(default_factory=dict)
    megatron_config: None = None
    megatron_core: str | None = "megatron.core"
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    use_dora: bool = False
    layer_replication: Annotated[list[Range], Len(1, 1024)] | None = None
    lora_bias: bool = later(False, since="0.14")
    trainable_token_indices: list[TokenIndex] | dict[str, list[TokenIndex]] | None = later(None, since="0.15")
    target_parameters: list[str] | None = later(None, since="0.17")
    eva_config: EvaConfig | dict[str, Any] | None = later(None, since="0.14")
    corda_config: CordaConfig | dict[str, Any] | None = later(None, since="0.15")
    lora_ga_config: LoraGAConfig | dict[str, Any] | None = later(None, since="0.19")
    alora_invocation_tokens: list[TokenIndex] | None = later(None, since="0.18")
    use_bdlora: BdLoraConfig | dict[str, Any] | None = later(None, since="0.19")
    kasa_config: KasaConfig | dict[str, Any] | None = later(None, since="0.21")
    monteclora_config: MontecloraConfig | dict[str, Any] | None = later(None, since="0.20")
    velora_config: VeloraConfig | dict[str, Any] | None = later(None, since="0.20")
    runtime_config: LoraRuntimeConfig = runtime(LoraRuntimeConfig())
    prepared: Any = runtime(None)
    """(A0, B0) by module path, from a pass over data; B0 is None where B starts at zero."""
    conv_channels: dict[str, tuple[int, int]] = runtime({})
    """By module path, the second dimensions of A and B of convolutions in the file that is loaded (see `Lora.channels`)."""

    @property
    def variant(self) -> str | None:
        """The field that asks for another equation than B A, or None."""
        return next((name for name in VARIANTS if getattr(self, name)), None)

    def adapter_variant(self) -> Method | None:
        return VARIANTS[self.variant] if self.variant else None

    def companions(self) -> list[TunerConfig]:
        return list(tokens_beside(self.trainable_token_indices)) if self.trainable_token_indices else []

    def parameter_method(self, experts: int) -> Method:
        return (
            Method("expert_lora", "LoraConfig", "ExpertLora") if experts > 1 else Method("lora", "LoraConfig", "Lora")
        )

    def follow_file(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Versions of PEFT adapt grouped convolutions differently; only the shapes of A and B tell which one did."""
        follow_old_patterns(self, shapes)
        for key, shape in shapes.items():
            module, found, _ = key.removeprefix(PREFIX).partition(".lora_B.weight")
            a_shape = shapes.get(key.replace(".lora_B.", ".lora_A."), ())
            if found and len(shape) == len(a_shape) > 2:
                self.conv_channels[module] = a_shape[1], shape[1]

    def stored(self) -> LoraConfig:
        """A start taken from the base is stored as plain LoRA of twice the rank at the same scaling."""
        if not takes_start_from_base(self.init_lora_weights):
            return self
        factor = math.sqrt(2) if self.use_rslora else 2
        return replace(
            self,
            init_lora_weights=True,
            r=2 * self.r,
            lora_alpha=factor * self.lora_alpha,
            rank_pattern={key: 2 * r for key, r in self.rank_pattern.items()},
            alpha_pattern={key: factor * alpha for key, alpha in self.alpha_pattern.items()},
        )

    def validate(self) -> None:
        super().validate()
        nested = {"loftq_config": LoftQConfig, "eva_config": EvaConfig}
        for name, kind in {
            **nested,
            "corda_config": CordaConfig,
            "lora_ga_config": LoraGAConfig,
            **SETTINGS,
        }.items():
            value = getattr(self, name)
            if isinstance(value, dict) and (value or name in SETTINGS):
                setattr(self, name, build_nested(kind, value, field=name))
        self._check_variant()
        if self.init_lora_weights == "loftq" and not self.loftq_config:
            raise InputError(
                "`loftq_config` must be specified when `init_lora_weights` is 'loftq'.", field="loftq_config"
            )
        if self.lora_bias and self.variant:
            raise InputError(f"`lora_bias=True` can't be combined with `{self.variant}`", field="lora_bias")
        if self.target_parameters and (self.lora_dropout or self.variant or self.lora_bias or self.fan_in_fan_out):
            raise InputError(
                f"can't be combined with lora_dropout, {self.variant or 'use_dora'}, lora_bias or fan_in_fan_out",
                field="target_parameters",
            )

    def _check_variant(self) -> None:
        asked = [name for name in VARIANTS if getattr(self, name)]
        if len(asked) > 1:
            raise InputError(f"can't be combined with `{asked[1]}`", field=asked[0])
        if asked and asked != ["use_dora"] and self.init_lora_weights not in (True, False, "gaussian"):
            raise InputError(
                f"{self.init_lora_weights!r} can't be combined with `{asked[0]}`",
                field="init_lora_weights",
                allowed="True, False, gaussian",
            )
