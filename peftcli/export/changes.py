"""What adapters change in a base model's checkpoint: which tensors, and to what.

Nothing is computed here before it is asked for, and then one tensor at a time. Names of the model and of the checkpoint
may differ in their outermost parts; a tied head has no tensor of its own until an adapter makes it differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peftcli.adapters.audit_modules import Part
from peftcli.adapters.base import BaseWeight, CopyAdapter, LowRankAdapter, SiteShape
from peftcli.adapters.header import TensorInfo
from peftcli.adapters.keys import base_path
from peftcli.adapters.registry import adapter_class
from peftcli.errors import InputError, InputErrors
from peftcli.export.layers import common_replication, replicated_names
from peftcli.export.quantized import Rounding
from peftcli.lazy import torch
from peftcli.merging.base_weights import BaseWeights, stores_transposed, to_matrix, to_stored
from peftcli.merging.source import Source

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
BLOCK = 1 << 17
"""Elements of a weight that are in float32 at once where an update is added: they fit into the cache."""


@dataclass(frozen=True)
class Step:
    """One adapter at one module."""

    source: Source
    part: Part
    path: str

    @property
    def shape(self) -> SiteShape:
        return self.part.fits[self.path].shape

    @property
    def follows_ties(self) -> bool:
        return adapter_class(self.part.config).follows_ties

    def applied(self, matrix: Tensor) -> Tensor:
        """The weight [out, in] with the adapter in it, float32."""
        adapter, p = self._open(lambda: matrix)
        if self.source.starts_from_quantized:
            start = adapter.regenerate(p)
            matrix = matrix if start is None else start
        return adapter.merged_weight(p, matrix)

    def applied_to_bias(self, bias: Tensor) -> Tensor:
        """The bias [out] that belongs to it."""
        adapter, p = self._open(lambda: self.source.base_weight(self.shape))
        return adapter.merged_bias(p, bias)

    @property
    def is_product(self) -> bool:
        """Whether all it does to the weight is to add B A."""
        cls = type(self.part.fits[self.path].adapter)
        plain = issubclass(cls, LowRankAdapter) and cls.delta is LowRankAdapter.delta
        return plain and cls.merged_weight is LowRankAdapter.merged_weight and not self.source.starts_from_quantized

    def factors(self, weight: BaseWeight) -> tuple[Tensor, Tensor]:
        """A and B, float32, of an update that is their product."""
        adapter, p = self._open(weight)
        return adapter.factors(p)

    def _open(self, weight: BaseWeight) -> tuple[Any, Any]:
        fit = self.part.fits[self.path]
        adapter = type(fit.adapter)(fit.adapter.config, fit.shape, weight, lambda: self.source.base_bias(self.shape))
        return adapter, self.source.tensors_at(self.part, self.path, adapter)


@dataclass
class Change:
    """One tensor of the result.

    Attributes:
        name: in the checkpoint that is written.
        origin: the base's tensor it comes from; None for one that only an adapter has (a new head).
        copy: an adapter's own version of it, with the adapter.
        steps: what is applied to it, in order.
        is_bias: whether it is a bias.
        is_rounded: whether training saw it quantised, and it is merged into that.
    """

    name: str
    origin: TensorInfo | None
    copy: tuple[Source, TensorInfo] | None = None
    steps: list[Step] = field(default_factory=list)
    is_bias: bool = False
    is_rounded: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        info = self.copy[1] if self.copy else self.origin
        assert info is not None
        return info.shape

    @property
    def is_untouched(self) -> bool:
        return self.copy is None and not self.steps and not self.is_rounded


class Changes:
    """All tensors of the merged model.

    Args:
        base: the base model.
        sources: adapters, the first applied first.
        rounding: how the base was quantised in training, to merge into what training saw.

    Attributes:
        tensors: by name, in the base's order.
        unties: whether input and output embeddings stop being one tensor.

    Raises:
        InputErrors: naming what can't be merged into a base.
    """

    def __init__(self, base: BaseWeights, sources: Sequence[Source], rounding: Rounding | None = None) -> None:
        self.base, self.sources, self.rounding = base, list(sources), rounding
        self.unties = False
        self.replication = common_replication([source.config for source in sources])
        names = replicated_names(base.facts, self.replication)
        self.tensors = {name: Change(name, info) for name, info in names.items()}
        self.tied = self._tied_embedding()
        for name in rounding.names if rounding else ():
            if (found := self._name(name)) is not None:
                self.tensors[found].is_rounded = True
        problems: list[InputError] = []
        for source in sources:
            problems += [*self._add_copies(source), *self._add_steps(source)]
        if problems:
            raise problems[0] if len(problems) == 1 else InputErrors(problems)

    def value(self, change: Change) -> Tensor:
        """The tensor as it is written, still in the dtype of what it comes from."""
        stored = self._start(change)
        if not change.steps:
            return stored
        if change.is_bias:
            bias = stored.float()
            for step in change.steps:
                bias = step.applied_to_bias(bias)
            return bias.to(stored.dtype)
        return self._weight(change, stored)

    def _start(self, change: Change) -> Tensor:
        if change.copy is not None:
            return change.copy[0].read(change.copy[1])
        assert change.origin is not None
        stored = self.base.read(change.origin)
        return self.rounding.rounded(stored) if self.rounding and change.is_rounded else stored

    def _weight(self, change: Change, stored: Tensor) -> Tensor:
        shape, facts = change.steps[0].shape, self.base.facts
        upright = stored.dim() == 2 and not stores_transposed(shape, facts)
        if upright and all(step.is_product for step in change.steps):
            _add_products(stored, [step.factors(lambda: stored.float()) for step in change.steps])
            return stored
        value = stored.float()
        with torch.no_grad():
            for step in change.steps:  # an embedding and a head that was one with it see the tensor differently
                matrix = step.applied(to_matrix(value, step.shape, facts))
                value = to_stored(matrix, value.shape, step.shape, facts)
        return value.to(stored.dtype)

    # -- planning -------------------------------------------------------------------------------------------------

    def _tied_embedding(self) -> str | None:
        """The tensor that is both embedding and head, if there is one."""
        config = self.base.facts.config
        flag = config.get("tie_word_embeddings", self.base.facts.language_config.get("tie_word_embeddings"))
        causal = any("CausalLM" in str(name) or "LMHead" in str(name) for name in config.get("architectures") or [])
        if flag is False or not (flag or (causal and HEAD not in self.tensors)):
            return None
        found = [name for name in self.tensors if f".{name}".endswith(tuple(f".{end}" for end in EMBEDDINGS))]
        return found[0] if len(found) == 1 else None

    def _name(self, name: str) -> str | None:
        """A tensor of the model as the checkpoint calls it."""
        parts = name.split(".")
        candidates = (".".join(parts[start:]) for start in range(max(1, len(parts) - 1)))
        return next((item for item in candidates if item in self.tensors), None)

    def _add_copies(self, source: Source) -> list[InputError]:
        problems = []
        trained = list(getattr(source.config, "modules_to_save", None) or [])
        for name, info in source.copies.items():
            is_trained = any(f"{entry}." in name for entry in trained)
            if self.tied is not None and name == HEAD:
                if not is_trained or _same(source, info, self.tensors[self.tied].copy):
                    continue  # stored beside the adapter because tokens were added: still one with the embedding
                target = self._untied_head().name
            else:
                target = self._name(name) or name
                if target == self.tied and is_trained and not _also_in(source, HEAD, info):
                    self._untied_head()
            change = self.tensors.setdefault(target, Change(target, None))
            if change.copy is not None:
                problems.append(InputError(f"{name} is trained in full by two adapters", place=source.folder))
            change.copy = (source, info)
        return problems

    def _add_steps(self, source: Source) -> list[InputError]:
        problems = []
        for part in source.audit.contents.parts:
            for path, fit in part.fits.items():
                problem = self._problem(source, part, path)
                if problem is not None:
                    problems.append(InputError(problem, place=source.folder))
                elif isinstance(fit.adapter, CopyAdapter):
                    self._add_module_copy(source, part, path)
                else:
                    problems += self._add_step(Step(source, part, path))
        if source.part is None:
            problems.append(InputError(f"{source.what} adapters cannot be merged into a base", place=source.folder))
        return problems

    def _problem(self, source: Source, part: Part, path: str) -> str | None:
        adapter = part.fits[path].adapter
        if adapter.shape.kind == "parameter":
            return f"{base_path(path)}: a fused parameter can't be merged file by file"
        if self.replication and adapter.mergeable:
            return None  # each layer is written out, so nothing is shared
        problem = type(adapter)(adapter.config, part.fits[path].shape).merge_problem()
        return None if problem is None or isinstance(adapter, CopyAdapter) else f"{base_path(path)}: {problem}"

    def _add_module_copy(self, source: Source, part: Part, path: str) -> None:
        for name, info in part.modules[path].items():
            target = f"{base_path(path)}.{name.rpartition('.')[2]}"
            target = self._name(target) or target
            self.tensors.setdefault(target, Change(target, None)).copy = (source, info)

    def _add_step(self, step: Step) -> list[InputError]:
        module = step.shape.name
        weight = f"{module}.{'in_proj_weight' if step.shape.kind == 'attention' else 'weight'}"
        bias = f"{module}.{'in_proj_bias' if step.shape.kind == 'attention' else 'bias'}"
        if self.tied is not None and weight == HEAD:
            if step.follows_ties:
                return []  # the file repeats the rows of the embedding
            self._untied_head().steps.append(step)
            return []
        name = self._name(weight)
        if name is None:
            return [InputError(f"the base has no tensor {weight}", place=step.source.folder)]
        if name == self.tied and not step.follows_ties:
            self._untied_head()
        self.tensors[name].steps.append(step)
        if name == self.tied and self.unties and step.follows_ties:
            self.tensors[HEAD].steps.append(step)
        bias_name = self._name(bias)
        if bias_name is not None:
            change = self.tensors[bias_name]
            change.is_bias = True
            change.steps.append(step)
        return []

    def _untied_head(self) -> Change:
        """The head's own tensor, made when an adapter treats it otherwise than the embedding."""
        assert self.tied is not None
        if not self.unties:
            self.unties = True
            embedding = self.tensors[self.tied]
            following = [step for step in embedding.steps if step.follows_ties]
            self.tensors[HEAD] = Change(HEAD, embedding.origin, embedding.copy, following)
        return self.tensors[HEAD]


def _add_products(weight: Tensor, factors: Sequence[tuple[Tensor, Tensor]]) -> None:
    """weight += sum of B A in place, a block of rows at a time in float32.

    Blocks may round a value otherwise than one product of the whole would: seen with PEFT's result for 1 of 1.36e9, in bf16.
    """
    rows = max(1, BLOCK // weight.shape[1])
    with torch.no_grad():
        for start in range(0, weight.shape[0], rows):
            block = weight[start : start + rows].float()
            for a, b in factors:
                block += b[start : start + rows] @ a
            weight[start : start + rows] = block


def _same(source: Source, info: TensorInfo, other: tuple[Source, TensorInfo] | None) -> bool:
    return (
        other is not None and info.shape == other[1].shape and torch.equal(source.read(info), other[0].read(other[1]))
    )


def _also_in(source: Source, name: str, info: TensorInfo) -> bool:
    """Whether the adapter holds the same values for another tensor."""
    other = source.copies.get(name)
    return other is not None and _same(source, info, (source, other))
