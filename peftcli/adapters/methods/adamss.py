"""AdaMSS: dW = C V^T, V the R leading right singular vectors of [W, b]; the rows of C fall into subspaces, each with a
product B_i A_i of its own (Zheng et al. 2025, "AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning").

Which rows belong together follows from the left singular vectors by k-means. No file says it: it is found again from the
base's weight, in which a bias counts as one more column.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from peftcli.adapters.base import Adapter, LowRankAdapter, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.fit import ANY
from peftcli.adapters.methods.lora import Rank
from peftcli.adapters.methods.vera import Seed
from peftcli.adapters.registry import Method
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import Site

Count = Annotated[int, Ge(0)]
Decay = Annotated[float, Ge(0), Le(1)]
Positive = Annotated[int, Ge(1)]


@dataclass
class AdamssConfig(TunerConfig):
    """AdaMSS's fields, as in PEFT.

    Attributes:
        r: R, how many singular vectors of a weight are used; at most as many as there are.
        num_subspaces: subspaces the rows of a weight fall into.
        subspace_rank: rank of each.
        init_weights: `orthogonal` starts at the base (B = 0); None or False at random, for tests.
        use_dynamic_rank: give a subspace only as many ranks as it has large singular values, `subspace_rank` at most.
        svd_threshold: what is large: the share of the largest, both squared.
        random_seed: of the random projection behind the singular vectors.
        use_asa: adaptive subspace allocation: train ever fewer subspaces, the most important of all modules together (see
            `subspace_allocator`).
        asa_target_subspaces: how many are trained in the end.
        init_warmup, final_warmup: steps at which choosing begins and ends.
        mask_interval: steps from one choice to the next.
        asa_importance_beta, asa_uncertainty_beta: how much of the smoothed values a step keeps.
        asa_schedule_exponent: of the share of steps left, along which the number falls.
    """

    peft_type = "ADAMSS"
    prefix = "adamss_"
    absent = frozenset({"exclude_modules"})

    r: Rank = 100
    num_subspaces: Positive = 5
    subspace_rank: Positive = 1
    init_weights: Literal["orthogonal", False] | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: Count = 50
    init_warmup: Count = 50
    final_warmup: Count = 1000
    mask_interval: Count = 100
    asa_importance_beta: Decay = 0.85
    asa_uncertainty_beta: Decay = 0.85
    asa_schedule_exponent: float | int = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: Annotated[float, Gt(0), Le(1)] = 0.1
    random_seed: Seed = 0

    def validate(self) -> None:
        super().validate()
        if not self.use_asa:
            return
        for name in ("asa_target_subspaces", "mask_interval"):
            if getattr(self, name) < 1:
                raise InputError("must be at least 1 with `use_asa`", field=name)
        if self.init_warmup >= self.final_warmup:
            raise InputError(
                f"{self.final_warmup} is not after init_warmup, {self.init_warmup}: there is no step to choose at",
                field="final_warmup",
            )

    def adapter_variant(self) -> Method | None:
        allocates = self.use_asa and not self.inference_mode
        return Method("adamss", "AdamssConfig", "AllocatedAdamss") if allocates else None


class Adamss(LowRankAdapter):
    """The products B_i A_i below each other, in the rows' order, times V^T."""

    config: AdamssConfig

    @classmethod
    def arrange(cls, adapters: list[Adamss]) -> None:
        """Warn where all rows are equally far apart, as those of an orthogonal matrix are."""
        if unsure := [adapter.shape.name for adapter in adapters if adapter.r == adapter.shape.out_features]:
            warnings.warn(
                f"r reaches the number of outputs of {unsure[0]} ({len(unsure)} such modules): rounding decides which "
                "rows share a subspace there, so another machine may read the file otherwise; a smaller r is safe",
                stacklevel=2,
            )

    # -- what follows from the base ---------------------------------------------------------------------------------

    @cached_property
    def singular_vectors(self) -> tuple[Tensor, Tensor]:
        """The leading left [out, R] and right [R, in] ones of the weight with its bias, float32, on the CPU."""
        whole = self.weight().detach().cpu().float()
        if self.shape.has_bias:
            whole = torch.cat([whole, self.bias().detach().cpu().float()[:, None]], dim=1)
        with torch.random.fork_rng(devices=[]):  # svd_lowrank takes no generator
            torch.default_generator.manual_seed(self.config.random_seed)
            u, _, v = torch.svd_lowrank(whole, q=self.r, niter=2)
        return u, v.T

    @cached_property
    def rows(self) -> list[Tensor]:
        """The rows of each subspace."""
        from peftcli.adapters.clusters import k_means

        labels = k_means(self.singular_vectors[0], self.count, steps=10, seed=123456789)
        rows = [torch.where(labels == group)[0] for group in range(self.count)]
        if not all(map(len, rows)):
            raise InputError(
                f"its rows fall into fewer than {self.count} subspaces", place=self.shape.name, field="num_subspaces"
            )
        return rows

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Rows and rank of each subspace: even shares where there is no weight to tell."""
        limit = min(self.config.subspace_rank, self.r)
        if self._weight is None or self.weight().is_meta:
            shares = [len(range(group, self.shape.matrix[0], self.count)) for group in range(self.count)]
            return [(size, min(size, limit)) for size in shares]
        limits = [limit] * self.count
        if self.config.use_dynamic_rank:
            squares = [torch.linalg.svdvals(self.singular_vectors[0][rows]) ** 2 for rows in self.rows]
            limits = [min(limit, max(1, int((s > self.config.svd_threshold * s[0]).sum()))) for s in squares]
        return [(len(rows), min(len(rows), limit)) for rows, limit in zip(self.rows, limits, strict=True)]

    @property
    def count(self) -> int:
        """How many subspaces."""
        return min(self.config.num_subspaces, self.shape.matrix[0])

    @property
    def r(self) -> int:
        """R."""
        out_features, in_features = self.shape.matrix
        return min(self.config.r, out_features, in_features + self.shape.has_bias)

    # -- tensors ----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, TensorSpec]:
        out_features, in_features = self.shape.matrix
        specs = {
            "adamss_newB": TensorSpec((self.r, in_features + self.shape.has_bias), trainable=False),
            "adamss_places": TensorSpec((out_features,), trainable=False, saved=False, dtype="int64"),
        }
        for group, (size, rank) in enumerate(self.sizes):
            specs[f"adamss_A.{group}"] = TensorSpec((rank, self.r))
            specs[f"adamss_B.{group}"] = TensorSpec((size, rank), "zeros")
        return specs

    def file_tensors(self) -> dict[str, TensorSpec]:
        known = {"adamss_newB": super().file_tensors()["adamss_newB"]}
        for group in range(self.count):
            known[f"adamss_A.{group}"] = TensorSpec((ANY, self.r))
            known[f"adamss_B.{group}"] = TensorSpec((ANY, ANY))
        return known

    def initialize(self, p: Tensors) -> None:
        u, vh = self.singular_vectors
        p.adamss_newB.copy_(vh)
        for group, rows in enumerate(self.rows):
            a, b = p[f"adamss_A.{group}"], p[f"adamss_B.{group}"]
            a.copy_(torch.linalg.svd(u[rows], full_matrices=False).Vh[: len(a)])
            if not self.config.init_weights:
                b.normal_(std=0.01)
        self.regenerate(p)

    def regenerate(self, p: Tensors) -> None:
        p.adamss_places.copy_(torch.cat(self.rows).argsort())
        self.__dict__.pop("singular_vectors", None)  # larger than the adapter, and of no more use

    # -- equation ---------------------------------------------------------------------------------------------------

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        products = [p[f"adamss_B.{group}"] @ p[f"adamss_A.{group}"] for group in range(self.count)]
        return p.adamss_newB[:, : self.shape.matrix[1]], torch.cat(products)[p.adamss_places] * self.scaling

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        update = super().activation(p, x, site)
        if update is None or not self.shape.has_bias:
            return update
        return update + site.broadcast(self._bias_update(p)).to(update.dtype)

    def merged_bias(self, p: Tensors, bias: Tensor) -> Tensor:
        return bias + self._bias_update(p).to(bias.dtype)

    def _bias_update(self, p: Tensors) -> Tensor:
        return self.factors(p)[1] @ p.adamss_newB[:, -1]


class AllocatedAdamss(Adamss):
    """With what the allocator keeps of each subspace."""

    def tensors(self) -> dict[str, TensorSpec]:
        specs = super().tensors()
        for key in [key for key, spec in specs.items() if spec.trainable]:
            name, group = key.split(".")
            for what in ("importance", "uncertainty"):
                specs[f"{name}_{what}.{group}"] = TensorSpec(specs[key].shape, "zeros", trainable=False, saved=False)
        specs["adamss_kept"] = TensorSpec((self.count,), trainable=False, saved=False, dtype="bool")
        return specs

    def regenerate(self, p: Tensors) -> None:
        super().regenerate(p)
        p.adamss_kept.fill_(True)
        for key, tensor in p.items():
            if key.split(".")[0].endswith(("_importance", "_uncertainty")):
                tensor.zero_()

    @classmethod
    def after_step(cls, sites: list[tuple[Adapter, Tensors]], config: Any, step: int) -> None:
        from peftcli.adapters.subspace_allocator import allocate

        allocate([p for _, p in sites], config, step)
