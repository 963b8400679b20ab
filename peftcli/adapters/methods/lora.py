"""LoRA: dW = s B A with s = alpha / r (Hu et al. 2021, arXiv 2106.09685), or alpha / sqrt(r) for rsLoRA (2312.03732)."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from peftcli.adapters.base import Adapter, LowRankAdapter, Tensors, TensorSpec, fill
from peftcli.adapters.initializers import require_rank, start_factors, takes_start_from_base
from peftcli.adapters.methods.lora_config import Alpha, LoftQConfig, LoraConfig, Rank
from peftcli.adapters.old_patterns import read_alike
from peftcli.adapters.targets import pattern_value
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import ConvSite, Site

__all__ = ["Alpha", "LoftQConfig", "Lora", "LoraConfig", "Rank"]


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
        shape, r, learns_b = self.shape, self.r, self.config.init_lora_weights != "mica"
        out_features, in_features = shape.matrix
        if not learns_b and shape.kind not in ("linear", "embedding"):
            raise InputError(
                "mica starts linear layers and embeddings only", place=shape.name, field="init_lora_weights"
            )
        if shape.kind == "embedding":
            specs = {
                "lora_embedding_A": TensorSpec((r, in_features), "zeros"),
                "lora_embedding_B": TensorSpec((out_features, r), "normal", trainable=learns_b),
            }
            return specs | self._start_specs()
        if shape.kind == "conv":
            read, combined = self.channels
            a_shape, b_shape = (r, read, *shape.kernel), (out_features, combined, *(1 for _ in shape.kernel))
        else:
            a_shape, b_shape = (r, in_features), (out_features, r)
        if self.config.init_lora_weights == "orthogonal" and r % 2:
            raise InputError(
                f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead.",
                place=shape.name,
                field="r",
            )
        specs = {
            "lora_A.weight": TensorSpec(a_shape, "kaiming"),
            "lora_B.weight": TensorSpec(b_shape, "zeros", trainable=learns_b),
        }
        if self.config.lora_bias:
            specs["lora_B.bias"] = TensorSpec((out_features,), "zeros")
        return specs | self._start_specs()

    @cached_property
    def channels(self) -> tuple[int, int]:
        """(channels A reads, entries of A x an output of B combines) at a convolution of g groups.

        Plain LoRA is what PEFT makes: A reads all channels, and B is grouped; a file of PEFT 0.13 has a B that is not. Where
        that can't be (g does not divide r) or must be a part of the weight (starts, variants), A reads its group's only.
        """
        inputs, groups, r = self.shape.in_features, self.shape.groups, self.r
        within, across = (inputs // groups, r), (inputs, r // groups)
        told, plain = self.config.conv_channels.get(self.shape.name), type(self) is Lora
        if told == within or (plain and told == (inputs, r)):
            return told
        plain &= told == across or self.config.init_lora_weights in (True, False, "gaussian")
        return across if plain and not r % groups else within

    @property
    def crosses_groups(self) -> bool:
        """Whether outputs depend on channels of other groups: as no grouped convolution's do, so there is no dW."""
        return self.shape.groups > 1 and self.channels[0] == self.shape.in_features

    @property
    def _keeps_start(self) -> bool:
        """Whether a part of the base is subtracted again. As in PEFT, embeddings start as they always do."""
        return takes_start_from_base(self.config.init_lora_weights) and self.shape.kind != "embedding"

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
        elif how == "mica":
            b.copy_(minor_vectors(self.weight(), self.r))
            a.zero_()
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
        if (problem := self.merge_problem()) and self.crosses_groups:
            raise InputError(problem, place=self.shape.name)
        a, b = (factor.flatten(1) for factor in self.pair(p))
        if self._keeps_start:
            a, b = torch.cat([a, p.lora_A_start]), torch.cat([b, -p.lora_B_start], dim=1)
        return a, b * self.scaling

    def stored(self, p: Tensors) -> dict[str, Tensor]:
        held = super().stored(p)
        if not takes_start_from_base(self.config.init_lora_weights):
            return held
        for key, tensor in held.items():  # twice the rank (see `LoraConfig.stored`): with the start, or with nothing
            if key.startswith(("lora_A", "lora_embedding_A")):
                rest = p.lora_A_start if self._keeps_start else torch.zeros_like(tensor)
                held[key] = torch.cat([tensor, rest.reshape(tensor.shape)])
            elif key in ("lora_B.weight", "lora_embedding_B"):
                rest = -p.lora_B_start if self._keeps_start else torch.zeros_like(tensor)
                held[key] = torch.cat([tensor, rest.reshape(tensor.shape)], dim=1)
        return held

    @classmethod
    def stored_config(cls, sites: list[tuple[Adapter, Tensors]], config: LoraConfig) -> LoraConfig:
        return read_alike(config.stored(), [adapter.shape.name for adapter, _ in sites])

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        if self.crosses_groups:
            update: Tensor | None = cast("ConvSite", site).across_groups(x, p.lora_A, p.lora_B * self.scaling)
        else:
            update = super().activation(p, x, site)
        bias = p.get("lora_B.bias")
        return (
            update if bias is None or update is None else update + site.broadcast(bias * self.scaling).to(update.dtype)
        )

    def with_module(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        plain = type(self).activation is Lora.activation and not self.config.lora_bias and not self.crosses_groups
        return site.with_update(x, *self.factors(p)) if plain else None

    def merge_problem(self) -> str | None:
        if self.config.lora_bias and not self.shape.has_bias:
            return "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias."
        if self.crosses_groups:
            return "Merging is not supported for a convolution with groups > 1 whose A reads the channels of all groups"
        if self.config.layer_replication:
            return "Cannot merge LORA layers when base model layers are replicated"
        return super().merge_problem()

    def merged_bias(self, p: Tensors, bias: Tensor) -> Tensor:
        extra = p.get("lora_B.bias")
        return bias if extra is None else bias + extra * self.scaling


def minor_vectors(weight: Tensor, r: int) -> Tensor:
    """The left singular vectors [out, r] of a weight [out, in] that belong to its r smallest singular values."""
    require_rank("mica", r, weight)
    return torch.linalg.svd(weight.float(), full_matrices=False).U[:, -r:]


def initialize_orthogonal(a: Tensor, b: Tensor) -> None:
    """A and B from disjoint halves of one random orthogonal matrix [r, r], so that B A = 0 and neither is zero."""
    r = a.shape[0]
    basis, _ = torch.linalg.qr(torch.randn(r, r, device=a.device))
    in_features, out_features = a.flatten(1).shape[1], b.shape[0]
    a.copy_((torch.randn(in_features, r // 2, device=a.device) @ basis[0::2] / 10).T.reshape(a.shape))
    b.copy_((torch.randn(out_features, r // 2, device=a.device) @ basis[1::2] / 10).reshape(b.shape))
