"""LoRA: dW = s B A with s = alpha / r (Hu et al. 2021, arXiv 2106.09685), or alpha / sqrt(r) for rsLoRA (2312.03732)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Len
from pydantic import Field

from peftcli.adapters.base import LowRankAdapter, Tensors, TensorSpec, fill
from peftcli.adapters.config import TunerConfig, build_nested, later, runtime
from peftcli.adapters.initializers import start_factors, takes_start_from_base
from peftcli.adapters.initializers.corda import CordaConfig
from peftcli.adapters.initializers.eva import EvaConfig
from peftcli.adapters.initializers.lora_ga import LoraGAConfig
from peftcli.adapters.methods.lora_variants import (
    SETTINGS,
    VARIANTS,
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peftcli.adapters.methods.trainable_tokens import TokenIndex, tokens_beside
from peftcli.adapters.registry import Method
from peftcli.adapters.targets import pattern_value
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import Site

Range = Annotated[list[Annotated[int, Ge(0)]], Len(2, 2)]
Rank = Annotated[int, Ge(1), Le(1 << 20)]
Alpha = Annotated[float, Gt(0)] | Annotated[int, Gt(0)]
Init = (
    bool
    | Literal["gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "corda", "lora_ga"]
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
            or a start taken from the base (`pissa`, `pissa_niter_<n>`, `olora`, `loftq`) or from data (`eva`, `corda`,
            `lora_ga`): see `initializers`.
        loftq_config, eva_config, corda_config, lora_ga_config: settings of those.
        trainable_token_indices: rows of the input embedding (or of each module named) to train as well.
        target_parameters: weights adapted although no linear layer holds them (fused experts), by their name's ending.
        layer_replication: (start, end) ranges of the base's layers a deeper model is built of (see `surgery`).
        rank_pattern, alpha_pattern: r or alpha by module name or regular expression, where they differ.
        lora_bias: give lora_B a bias.
        alora_invocation_tokens: token ids from whose last occurrence on the adapter acts (`alora.py`).
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
    prepared: Any = runtime(None)
    """(A0, B0) by module path, from a pass over data; B0 is None where B starts at zero."""

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
        if self.lora_bias and self.bias != "none":
            raise InputError(f"`lora_bias=True` is not supported together with bias={self.bias!r}", field="lora_bias")
        if self.lora_bias and self.variant:
            raise InputError(f"`lora_bias=True` can't be combined with `{self.variant}`", field="lora_bias")
        if self.target_parameters and (self.lora_dropout or self.variant or self.lora_bias or self.fan_in_fan_out):
            raise InputError(
                f"can't be combined with lora_dropout, {self.variant or 'use_dora'}, lora_bias or fan_in_fan_out",
                field="target_parameters",
            )
        odd = [r for r in (self.r, *self.rank_pattern.values()) if r % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            raise InputError(
                f"Orthogonal initialization requires the LoRA rank to be even, got {odd[0]} instead.", field="r"
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


class Lora(LowRankAdapter):
    """B A, scaled."""

    config: LoraConfig

    @cached_property
    def r(self) -> int:
        return pattern_value(self.config.rank_pattern, self.shape.name, self.config.r, field="rank_pattern")

    @cached_property
    def lora_alpha(self) -> float:
        return pattern_value(self.config.alpha_pattern, self.shape.name, self.config.lora_alpha, field="alpha_pattern")

    @property
    def dropout(self) -> float:
        return self.config.lora_dropout

    def initial_scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.config.use_rslora else self.r)

    def tensors(self) -> dict[str, TensorSpec]:
        shape, r = self.shape, self.r
        out_features, in_features = shape.matrix
        if shape.kind == "embedding":
            specs = {
                "lora_embedding_A": TensorSpec((r, in_features), "zeros"),
                "lora_embedding_B": TensorSpec((out_features, r), "normal"),
            }
            return specs | self._start_specs()
        ones = (1,) * len(shape.kernel)
        a_shape = (r, shape.in_features // shape.groups, *shape.kernel) if shape.kind == "conv" else (r, in_features)
        specs = {
            "lora_A.weight": TensorSpec(a_shape, "kaiming"),
            "lora_B.weight": TensorSpec((out_features, r, *ones), "zeros"),
        }
        if self.config.lora_bias:
            specs["lora_B.bias"] = TensorSpec((out_features,), "zeros")
        return specs | self._start_specs()

    @property
    def _keeps_start(self) -> bool:
        return takes_start_from_base(self.config.init_lora_weights)

    def _start_specs(self) -> dict[str, TensorSpec]:
        """A0 and B0 [r, in], [out, r] as matrices, where the adapter starts from a part of the base."""
        if not self._keeps_start:
            return {}
        out_features, in_features = self.shape.matrix
        return {
            "lora_A_start": TensorSpec((self.r, in_features), trainable=False, saved=False),
            "lora_B_start": TensorSpec((out_features, self.r), trainable=False, saved=False),
        }

    def initialize(self, p: Tensors) -> Tensor | None:
        how = self.config.init_lora_weights
        embedding = self.shape.kind == "embedding"
        a, b = self.pair(p)
        if how == "eva" and self.config.prepared:
            a.copy_(self.config.prepared[self.shape.name][0].reshape(a.shape))
        if self._keeps_start:
            self.regenerate(p)
            a.copy_(p.lora_A_start.reshape(a.shape))
            b.copy_(p.lora_B_start.reshape(b.shape))
        if how == "loftq":
            return self._quantize(a, b)
        if how is False:  # a random update, so that a test sees the adapter
            fill(a if embedding else b, "normal" if embedding else "kaiming")
        elif how == "gaussian" and not embedding:
            a.normal_(std=1 / self.r)
        elif how == "orthogonal" and not embedding:
            initialize_orthogonal(a, b)
        return None

    def regenerate(self, p: Tensors) -> Tensor | None:
        if self._keeps_start:
            a, b = self._start()
            p.lora_A_start.copy_(a)
            p.lora_B_start.copy_(b)
        if self.config.init_lora_weights == "loftq":
            a, b = (torch.empty_like(factor) for factor in self.pair(p))
            return self._quantize(a, b)
        return None

    def _start(self) -> tuple[Tensor, Tensor]:
        """A0 and B0, computed from the base weight or prepared from data."""
        how = str(self.config.init_lora_weights)
        if how not in ("corda", "lora_ga"):
            return start_factors(how, self.weight(), self.r, self.initial_scaling())
        if not self.config.prepared:
            tool = "preprocess_corda" if how == "corda" else "preprocess_loraga"
            raise InputError(
                f"a start by {how} comes from data, which neither a config nor an adapter file holds",
                place=self.shape.name,
                field="init_lora_weights",
                fix=f"call {tool} before get_peft_model; adapters saved by peftcli need nothing",
            )
        return self.config.prepared[self.shape.name]

    def _quantize(self, a: Tensor, b: Tensor) -> Tensor:
        """LoftQ's start into A and B; returns the quantised weight that replaces the base's."""
        from peftcli.adapters.initializers.loftq import loftq

        how: Any = self.config.loftq_config
        weight = self.weight()
        quantized, a_start, b_start = loftq(weight, self.r, self.initial_scaling(), how.loftq_bits, how.loftq_iter)
        a.copy_(a_start.reshape(a.shape))
        b.copy_(b_start.reshape(b.shape))
        return quantized.to(weight.dtype)

    def pair(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """A and B as they are stored."""
        if self.shape.kind == "embedding":
            return p.lora_embedding_A, p.lora_embedding_B
        return p.lora_A, p.lora_B

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        a, b = (factor.flatten(1) for factor in self.pair(p))
        if self._keeps_start:
            a, b = torch.cat([a, p.lora_A_start]), torch.cat([b, -p.lora_B_start], dim=1)
        return a, b * self.scaling

    def stored(self, p: Tensors) -> dict[str, Tensor]:
        held = super().stored(p)
        if self._keeps_start:
            names = ("lora_embedding_A", "lora_embedding_B") if self.shape.kind == "embedding" else ("lora_A", "lora_B")
            for key in held:
                if key.startswith(names[0]):
                    start = p.lora_A_start.reshape(held[key].shape)
                    held[key] = torch.cat([held[key], start])
                elif key.startswith(names[1]) and not key.endswith("bias"):
                    held[key] = torch.cat([held[key], -p.lora_B_start.reshape(held[key].shape)], dim=1)
        return held

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        update = super().activation(p, x, site)
        bias = p.get("lora_B.bias")
        return (
            update if bias is None or update is None else update + site.broadcast(bias * self.scaling).to(update.dtype)
        )

    def merge_problem(self) -> str | None:
        if self.config.lora_bias and not self.shape.has_bias:
            return "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias."
        if self.config.layer_replication:
            return "Cannot merge LORA layers when base model layers are replicated"
        return super().merge_problem()

    def merged_bias(self, p: Tensors, bias: Tensor) -> Tensor:
        extra = p.get("lora_B.bias")
        return bias if extra is None else bias + extra * self.scaling


def initialize_orthogonal(a: Tensor, b: Tensor) -> None:
    """A and B from disjoint halves of one random orthogonal matrix [r, r], so that B A = 0 and neither is zero."""
    r = a.shape[0]
    basis, _ = torch.linalg.qr(torch.randn(r, r, device=a.device))
    in_features, out_features = a.flatten(1).shape[1], b.shape[0]
    a.copy_((torch.randn(in_features, r // 2, device=a.device) @ basis[0::2] / 10).T.reshape(a.shape))
    b.copy_((torch.randn(out_features, r // 2, device=a.device) @ basis[1::2] / 10).reshape(b.shape))
