"""HiRA: dW = W * (B A), elementwise with the base weight W (Huang et al. 2025, ICLR, "HiRA: Parameter-Efficient Hadamard
High-Rank Adaptation").

The update has W's own rank although B A has rank r; there is no scaling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from peftcli.adapters.base import DeltaAdapter, Init, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.methods.loha import Probability
from peftcli.adapters.methods.lora import Rank
from peftcli.adapters.targets import pattern_value
from peftcli.lazy import functional

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import Site


@dataclass
class HiraConfig(TunerConfig):
    """HiRA's fields, as in PEFT.

    Attributes:
        r: rank of B A.
        hira_dropout: dropout on the input of the adapter's path.
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        init_weights: True (A Kaiming uniform, B zero), `gaussian` (A normal with deviation 1 / r), or False (both
            random: for tests).
        rank_pattern: r by module name or regular expression, where it differs.
    """

    peft_type = "HIRA"
    prefix = "hira_"

    r: Rank = 32
    hira_dropout: Probability = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | Literal["gaussian"] | None = True
    rank_pattern: dict[str, Rank] = field(default_factory=dict)

    def follow_file(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """PEFT makes every module's tensors of rank r, whatever the pattern it writes asks for."""
        ranks = {shape[0] for key, shape in shapes.items() if key.endswith((".hira_A", ".hira_embedding_A")) and shape}
        if ranks == {self.r}:
            self.rank_pattern = {}


class Hira(DeltaAdapter):
    """W * (B A)."""

    config: HiraConfig

    @cached_property
    def r(self) -> int:
        return pattern_value(self.config.rank_pattern, self.shape.name, self.config.r, field="rank_pattern")

    @property
    def dropout(self) -> float:
        return self.config.hira_dropout

    def tensors(self) -> dict[str, TensorSpec]:
        shape, r = self.shape, self.r
        out_features, in_features = shape.matrix
        a: Init = "kaiming" if self.config.init_weights is True else "normal"
        b: Init = "zeros" if self.config.init_weights else "normal"
        if shape.kind == "embedding":
            return {
                "hira_embedding_A": TensorSpec((r, in_features), b),
                "hira_embedding_B": TensorSpec((out_features, r), "normal"),
            }
        if shape.kind == "conv":
            ones = (1,) * len(shape.kernel)
            return {
                "hira_A": TensorSpec((r, shape.in_features // shape.groups, *shape.kernel), a),
                "hira_B": TensorSpec((out_features, r, *ones), b),
            }
        return {"hira_A": TensorSpec((r, in_features), a), "hira_B": TensorSpec((out_features, r), b)}

    def initialize(self, p: Tensors) -> Tensor | None:
        if self.config.init_weights == "gaussian" and "hira_A" in p:
            p.hira_A.div_(self.r)
        return None

    def delta(self, p: Tensors) -> Tensor:
        a, b = self._factors(p)
        return self.weight().to(a.dtype) * (b @ a) * self.scaling

    @property
    def builds_delta(self) -> bool:
        return self.shape.kind != "embedding"

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        if self.builds_delta:
            return None
        update = site.low_rank(x, *self._factors(p))  # only the rows of the tokens at hand
        return functional.embedding(x, self.weight().T).to(update.dtype) * update * self.scaling

    def _factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        if self.shape.kind == "embedding":
            return p.hira_embedding_A, p.hira_embedding_B
        return p.hira_A.flatten(1), p.hira_B.flatten(1)
