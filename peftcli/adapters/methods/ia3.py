"""(IA)^3: a learnt scale l on each feature (Liu et al. 2022, arXiv 2205.05638).

y = l * (W x + b) on attention projections, y = W (l * x) + b on the second layer of a feedforward block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from peftcli.adapters.base import Tensors, TensorSpec, TransformAdapter
from peftcli.adapters.config import TunerConfig, as_set
from peftcli.adapters.targets import matches
from peftcli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class IA3Config(TunerConfig):
    """(IA)^3's fields, as in PEFT.

    Attributes:
        feedforward_modules: the target modules whose inputs are scaled; names or a regular expression.
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        init_ia3_weights: start with l = 1; False draws l at random (for tests).
    """

    peft_type = "IA3"
    prefix = "ia3_"
    absent = frozenset({"layers_to_transform", "layers_pattern"})
    default_tables: ClassVar = {"target_modules": "targets", "feedforward_modules": "feedforward"}

    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.feedforward_modules = as_set(self.feedforward_modules)

    def validate(self) -> None:
        super().validate()
        targets, feedforward = self.target_modules, self.feedforward_modules
        if isinstance(targets, set) and isinstance(feedforward, set) and not feedforward <= targets:
            raise InputError(
                "`feedforward_modules` should be a subset of `target_modules`",
                field="feedforward_modules",
                allowed=", ".join(sorted(targets)),
            )

    def settle_targets(self, chosen: list[str]) -> None:
        """Keep `feedforward_modules` a subset of `target_modules`, as files have it: what it means beyond by its paths.

        The usual ones of a model type, or those beside `all-linear`, need not be among the targets' names.
        """
        targets, feedforward = self.target_modules, self.feedforward_modules
        if isinstance(targets, set) and isinstance(feedforward, set):
            beyond = {path for path in chosen if matches(feedforward - targets, path, field="feedforward_modules")}
            self.feedforward_modules = (feedforward & targets) | beyond
            self.target_modules = targets | beyond


class Ia3(TransformAdapter):
    """A scale on inputs or outputs."""

    kinds = frozenset({"linear", "conv", "attention"})
    config: IA3Config

    @cached_property
    def is_feedforward(self) -> bool:
        names = self.config.feedforward_modules or set()
        return matches(names, self.shape.name, field="feedforward_modules")

    @property
    def acts_on_inputs(self) -> bool:
        return self.is_feedforward

    @property
    def acts_on_outputs(self) -> bool:
        return not self.is_feedforward

    def tensors(self) -> dict[str, TensorSpec]:
        shape = self.shape
        features = shape.in_features if self.is_feedforward else shape.out_features
        if shape.kind == "conv":
            size: tuple[int, ...] = (1, features, *(1,) * len(shape.kernel))
        else:
            size = (1, features) if self.is_feedforward else (features, 1)
        return {"ia3_l": TensorSpec(size, "ones" if self.config.init_ia3_weights else "normal")}

    def merged_weight(self, p: Tensors, weight: Tensor) -> Tensor:
        if not self.is_feedforward:
            return super().merged_weight(p, weight)
        groups = self.shape.groups  # a kernel gives a channel several columns, a group sees its own channels
        by_channel = weight.reshape(groups, weight.shape[0] // groups, self.shape.in_features // groups, -1)
        return (by_channel * p.ia3_l.reshape(groups, 1, -1, 1)).reshape_as(weight)

    def before(self, p: Tensors, x: Tensor) -> Tensor:
        return x * p.ia3_l.flatten()

    def after(self, p: Tensors, y: Tensor) -> Tensor:
        return y * p.ia3_l.flatten()
