"""Poly: several LoRAs (skills) mixed by learnt weights of the row's task, y = W x + b + B_t A_t x / r.

A_t = sum over skills s of w[t, s] A_s, B_t likewise (Ponti et al. 2022, arXiv 2202.13914). With `n_splits` > 1 inputs and
outputs are cut into parts that mix on their own (multi-head routing, Caccia et al. 2022, arXiv 2211.03831). Weights are
sigmoids of trained logits, sampled in training (a relaxed Bernoulli), and sum to one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from peftcli.adapters.base import DeltaAdapter, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import Site

Count = Annotated[int, Ge(1), Le(1 << 16)]


@dataclass
class PolyConfig(TunerConfig):
    """Poly's fields, as in PEFT.

    Attributes:
        r: rank of each skill.
        n_tasks: how many tasks; `task_ids` of a batch tell the task of each row.
        n_skills: LoRAs at each module.
        n_splits: parts of inputs and outputs that mix on their own.
        poly_type: the router; PEFT has one.
        init_weights: B zero; False draws it at random (for tests).
    """

    peft_type = "POLY"
    prefix = "poly_"
    absent = frozenset({"layers_to_transform", "layers_pattern"})

    r: Count = 8
    n_tasks: Count = 1
    n_skills: Count = 4
    n_splits: Count = 1
    poly_type: Literal["poly"] = "poly"
    init_weights: bool = True


class Poly(DeltaAdapter):
    """Skills and a router."""

    kinds = frozenset({"linear"})
    mergeable = False
    needs_rows = True
    config: PolyConfig

    def tensors(self) -> dict[str, TensorSpec]:
        config, shape = self.config, self.shape
        splits, skills = config.n_splits, config.n_skills
        if shape.in_features % splits or shape.out_features % splits:
            raise InputError(
                f"{shape.in_features} inputs and {shape.out_features} outputs do not divide into {splits} parts",
                place=shape.name,
                field="n_splits",
            )
        return {
            "poly_lora_A": TensorSpec((splits, skills, shape.in_features // splits, config.r)),
            "poly_lora_B": TensorSpec((splits, skills, config.r, shape.out_features // splits), "zeros"),
            "poly_router.module_logits": TensorSpec((config.n_tasks, splits * skills)),
        }

    def initialize(self, p: Tensors) -> None:
        bound = 1 / math.sqrt(p.poly_lora_A.shape[2])
        p.poly_lora_A.uniform_(-bound, bound)
        if not self.config.init_weights:
            bound = 1 / math.sqrt(self.config.r)
            p.poly_lora_B.uniform_(-bound, bound)
        p["poly_router.module_logits"].uniform_(-1e-3, 1e-3)

    def mixture(self, p: Tensors, rows: int) -> Tensor:
        """The weight of each skill [rows, splits, skills]."""
        unsaid = self.context.task_ids is None and self.config.n_tasks == 1  # then there is nothing to choose
        tasks = torch.zeros(rows, dtype=torch.long) if unsaid else self.context.tasks(rows)
        tasks = tasks.to(p.poly_lora_A.device)
        known = torch.compiler.is_compiling() or 0 <= int(tasks.min()) <= int(tasks.max()) < self.config.n_tasks
        if not known:
            raise InputError(
                f"Only {self.config.n_tasks} tasks available. Found task id = {int(tasks.max())}", field="task_ids"
            )
        logits = p["poly_router.module_logits"][tasks].unflatten(1, (self.config.n_splits, self.config.n_skills))
        if self.training:
            chance = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            logits = logits + torch.logit(chance)
        weights = torch.sigmoid(logits)
        return weights / (weights.sum(-1, keepdim=True) + 1e-12)

    def delta(self, p: Tensors) -> Tensor:
        raise InputError("the update of a POLY adapter depends on the task: there is no single one")

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        mixture = self.mixture(p, x.shape[0])
        a = torch.einsum("bqs,qsdr->bqdr", mixture, p.poly_lora_A).flatten(1, 2)
        b = torch.einsum("bqs,qsrd->brqd", mixture, p.poly_lora_B).flatten(2, 3)
        hidden = torch.einsum("b...i,bir->b...r", x, a.to(x.dtype))
        return torch.einsum("b...r,bro->b...o", hidden, (b / self.config.r).to(x.dtype))
