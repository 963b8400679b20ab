"""What adapters change in a base model's checkpoint: which tensors, and to what.

Nothing is computed here before it is asked for, and then one tensor at a time. Names of the model and of the checkpoint
may differ in their outermost parts; a tied head has no tensor of its own until an adapter makes it differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peftcli.adapters.audit_modules import Part
from peftcli.adapters.base import BaseWeight, CopyAdapter, LowRankAdapter, SiteShape
from peftcli.adapters.base_facts import BaseFacts
from peftcli.adapters.header import TensorInfo
from peftcli.adapters.keys import base_path
from peftcli.adapters.methods.lora import Lora
from peftcli.adapters.registry import adapter_class
from peftcli.errors import InputError, InputErrors, printable
from peftcli.export.experts import Piece, pieces
from peftcli.export.layers import common_replication, replicated_names
from peftcli.export.quantized import Rounding
from peftcli.export.sums import Product
from peftcli.lazy import numpy, torch
from peftcli.merging.base_weights import BaseWeights, stores_transposed, to_matrix, to_stored
from peftcli.merging.source import Source, is_plain_lora
from peftcli.merging.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True)
class Step:
    """One adapter at one module, or at the piece of a fused parameter that one tensor holds."""

    source: Source
    part: Part
    path: str
    piece: Piece | None = None

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
        unchanged = cls.merged_weight is LowRankAdapter.merged_weight and not self.source.starts_from_quantized
        return self.piece is not None or (plain and unchanged)

    def product(self, facts: BaseFacts) -> Product:
        """B A, of an update that is nothing else, as the checkpoint stores it; numbers may be too large (`write_sum`)."""
        with numpy.errstate(over="ignore", invalid="ignore"):
            return self._product(facts)

    def _product(self, facts: BaseFacts) -> Product:
        shape = self.shape
        if self.piece is not None:
            a, b = self.source.experts(shape.name)
            chosen = slice(None) if self.piece.expert is None else self.piece.expert
            return Product.of(a[chosen], b[chosen, ..., slice(*self.piece.rows), :], transposed=self.piece.transposed)
        adapter = self.source.adapter(shape.name)
        if is_plain_lora(adapter):
            pair = self.source.pair(shape.name, cast(Lora, adapter))
            a, b = pair.a, pair.b * numpy.float32(adapter.scaling)
        else:
            opened, p = self._open(lambda: self.source.base_weight(shape))
            a, b = (factor.numpy() for factor in opened.factors(p))
        return Product.of(a, b, transposed=stores_transposed(shape, facts))

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

    def stored(self, change: Change) -> tuple[Path, TensorInfo]:
        """The file and tensor that a tensor of the result starts from."""
        if change.copy is not None:
            source, info = change.copy
            return source.audit.file.path, info
        assert change.origin is not None
        return self.base.files[change.origin.name], change.origin

    def products(self, change: Change) -> list[Product] | None:
        """What is added to the stored tensor; None where it becomes the result in another way."""
        if change.is_bias or change.is_rounded or not all(step.is_product for step in change.steps):
            return None
        return [step.product(self.base.facts) for step in change.steps]

    def value(self, change: Change) -> Tensor:
        """The tensor as it is written: in float32 where adapters changed it, else as it is stored."""
        stored = read_tensor(*self.stored(change))
        if change.is_rounded and self.rounding is not None and change.copy is None:
            stored = self.rounding.rounded(stored)
        if not change.steps:
            return stored
        value, facts = stored.float(), self.base.facts
        with torch.no_grad():
            for step in change.steps:  # an embedding and a head that was one with it see the tensor differently
                if change.is_bias:
                    value = step.applied_to_bias(value)
                else:
                    matrix = step.applied(to_matrix(value, step.shape, facts))
                    value = to_stored(matrix, value.shape, step.shape, facts)
        return value

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
        if source.part is None or not adapter_class(source.part.config).mergeable:
            return [InputError(f"{source.what} adapters cannot be merged into a base", place=source.folder)]
        problems = []
        for part in source.audit.contents.parts:
            for path, fit in part.fits.items():
                problem = self._problem(source, part, path)
                if problem is not None:
                    problems.append(InputError(problem, place=source.folder))
                elif isinstance(fit.adapter, CopyAdapter):
                    self._add_module_copy(source, part, path)
                elif fit.shape.kind == "parameter":
                    problems += self._add_experts(source, part, path)
                else:
                    problems += self._add_step(Step(source, part, path))
        return problems

    def _problem(self, source: Source, part: Part, path: str) -> str | None:
        adapter = part.fits[path].adapter
        if self.replication and adapter.mergeable:
            return None  # each layer is written out, so nothing is shared
        problem = type(adapter)(adapter.config, part.fits[path].shape).merge_problem()
        return None if problem is None or isinstance(adapter, CopyAdapter) else f"{base_path(path)}: {problem}"

    def _add_module_copy(self, source: Source, part: Part, path: str) -> None:
        for name, info in part.modules[path].items():
            target = f"{base_path(path)}.{name.rpartition('.')[2]}"
            target = self._name(target) or target
            self.tensors.setdefault(target, Change(target, None)).copy = (source, info)

    def _add_experts(self, source: Source, part: Part, path: str) -> list[InputError]:
        shape = part.fits[path].shape
        found = pieces(shape, self.base.facts.model_type, self._find)
        for piece in found:
            self.tensors[piece.name].steps.append(Step(source, part, path, piece))
        if found:
            return []
        sizes = f"{shape.experts} x {shape.out_features} x {shape.in_features}"
        return [InputError(f"the base has no parameter {printable(shape.name)} of {sizes}", place=source.folder)]

    def _find(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        stored = self._name(name)
        return None if stored is None else (stored, self.tensors[stored].shape)

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


def _same(source: Source, info: TensorInfo, other: tuple[Source, TensorInfo] | None) -> bool:
    return (
        other is not None and info.shape == other[1].shape and torch.equal(source.read(info), other[0].read(other[1]))
    )


def _also_in(source: Source, name: str, info: TensorInfo) -> bool:
    """Whether the adapter holds the same values for another tensor."""
    other = source.copies.get(name)
    return other is not None and _same(source, info, (source, other))
