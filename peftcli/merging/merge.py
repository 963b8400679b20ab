"""`peft merge`: several adapters' files into one adapter, module by module, without the base model.

In delta space (the default) the updates dW themselves are merged. `cat` keeps the factors side by side, `linear` brings
the same sum to the fewest directions, `svd` to those of the largest parent; the other operators work on the matrices and
come back by SVD. In factor space A is merged with A and B with B, as PEFT's `add_weighted_adapter` does.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peftcli.adapters.audit import WEIGHTS_NAME
from peftcli.adapters.base import SiteShape
from peftcli.adapters.config import CONFIG_NAME
from peftcli.adapters.methods.lora import Lora
from peftcli.errors import InputError, InputErrors, printable
from peftcli.lazy import numpy
from peftcli.merging.algebra import Compressed, LowRank, Rank, Update, compress, inner_products, sign_conflicts, stack
from peftcli.merging.algebra import Dense as DenseUpdate
from peftcli.merging.base_weights import BaseWeights
from peftcli.merging.copies import check_full_weights, copy_fields, merged_copy
from peftcli.merging.factors import combine_factors
from peftcli.merging.lora_file import copy_key, lora_config, module_tensors, write_config
from peftcli.merging.operators import OPERATORS, SVD_TYPES, Settings
from peftcli.merging.output import new_folder, require_free
from peftcli.merging.report import MergeReport, ModuleReport, card, write_report
from peftcli.merging.settings import MergeSettings
from peftcli.merging.source import Source, is_plain_lora
from peftcli.merging.tensors import TensorWriter
from peftcli.merging.tokens import merged_rows, token_fields, token_modules
from peftcli.merging.vectors import check_scales, merged_scale, scale_config

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray


def merge_adapters(
    folders: Sequence[Path], output: Path, settings: MergeSettings, *, base: Path | None = None, overwrite: bool = False
) -> MergeReport:
    """Merge adapter folders into a new one.

    Args:
        folders: the adapters.
        output: the folder to write.
        settings: how.
        base: the base model's folder; needed for methods whose update depends on it and for modules trained in full.
        overwrite: replace an earlier result.

    Raises:
        InputError: for adapters that are broken, do not belong together, or hold what can't be merged.
    """
    settings = settings.resolved(len(folders))
    inputs = [*folders, *([base] if base else [])]
    require_free(output, inputs=inputs, overwrite=overwrite)
    weights = BaseWeights(base) if base else None
    sources = [Source(folder, weights) for folder in folders]
    size = 4 * sum(source.audit.file.size for source in sources)
    with new_folder(output, inputs=inputs, overwrite=overwrite, size=size) as folder:
        report = _write(folder, sources, settings, weights)
        write_report(folder, report)
        (folder / "README.md").write_text(card(report, output.resolve().name), encoding="utf-8")
    return report


def _write(folder: Path, sources: list[Source], settings: MergeSettings, base: BaseWeights | None) -> MergeReport:
    if len(sources) == 1 and settings.weights == (1.0,) and not settings.prunes and settings.rank is None:
        return _copied(folder, sources[0], settings)
    check_together(sources, named=base is not None)
    merge = _Merge(sources, settings, base)
    check_full_weights(merge.sources, base)
    with TensorWriter(folder / WEIGHTS_NAME) as writer:
        config, rows = merge.scales(writer) if merge.is_ia3 else merge.matrices(writer)
        if base is not None:
            merge.full_weights(writer, base)
    write_config(folder, config)
    return merge.report(rows, config)


def _copied(folder: Path, source: Source, settings: MergeSettings) -> MergeReport:
    """One adapter with weight 1 is itself, whatever its method; a `.bin` becomes safetensors."""
    with TensorWriter(folder / WEIGHTS_NAME) as writer:
        for info in source.audit.file.tensors.values():
            writer.copy(info, source.audit.file.path)
    shutil.copyfile(source.folder / CONFIG_NAME, folder / CONFIG_NAME)
    return MergeReport.of([source], settings, [], source.config, cosines=[[1.0]])


def check_together(sources: Sequence[Source], *, named: bool) -> None:
    """Refuse adapters of different bases or shapes, and those without anything to merge.

    Args:
        named: whether the base was given; then names may differ (a folder, an id), since shapes are compared with it.
    """
    problems = []
    bases = {source.config.base_model_name_or_path for source in sources} - {None}
    if len(bases) > 1 and not named:
        problems.append(
            InputError(
                f"the adapters name different bases: {', '.join(sorted(map(printable, bases)))}",
                fix="if these are one model, name it: --base FOLDER",
            )
        )
    tasks = {str(source.config.task_type) for source in sources if source.config.task_type}
    if len(tasks) > 1:
        problems.append(InputError(f"the adapters are for different tasks: {', '.join(sorted(tasks))}"))
    if len({repr(getattr(source.config, "layer_replication", None)) for source in sources}) > 1:
        problems.append(InputError("the adapters replicate different layers", field="layer_replication"))
    shapes: dict[str, tuple[SiteShape, Source]] = {}
    for source in sources:
        if source.part is None:
            problems.append(InputError(f"{source.what} adapters have no update to merge", place=source.folder))
            continue
        for fit in source.part.fits.values():
            first, owner = shapes.setdefault(fit.shape.name, (fit.shape, source))
            if _differ(first, fit.shape):
                text = f"{fit.shape.name} is {list(fit.shape.matrix)} here and {list(first.matrix)} in {owner.folder}"
                problems.append(InputError(text, place=source.folder))
    if problems:
        raise problems[0] if len(problems) == 1 else InputErrors(problems)


def _differ(first: SiteShape, second: SiteShape) -> bool:
    """Whether two shapes can't be one module's; 0 is a size that the files don't tell."""
    sizes = zip(first.matrix, second.matrix, strict=True)
    return (first.kind, first.experts) != (second.kind, second.experts) or any(
        0 not in pair and pair[0] != pair[1] for pair in sizes
    )


class _Merge:
    """One merge. Adapters are taken in the order of their hashes, so that the order they are named in changes nothing."""

    def __init__(self, sources: Sequence[Source], settings: MergeSettings, base: BaseWeights | None) -> None:
        density: Iterable[float | None] = settings.density or (None,) * len(sources)
        rows = sorted(
            zip(sources, settings.weights, density, strict=True), key=lambda row: (row[0].sha256, row[1], row[2] or 0)
        )
        self.given, self.settings, self.base = list(sources), settings, base
        self.sources = [source for source, _, _ in rows]
        self.weights = [weight for _, weight, _ in rows]
        self.density = [kept for _, _, kept in rows if kept is not None]
        self._products = numpy.zeros((len(sources), len(sources)))

    @property
    def is_ia3(self) -> bool:
        return all(source.config.peft_type == "IA3" for source in self.sources)

    def generator(self, place: str) -> Generator:
        """Randomness of one module: it depends on the seed and the name, not on what was drawn before."""
        digest = hashlib.sha256(f"{self.settings.seed}:{place}".encode()).digest()
        return numpy.random.default_rng(int.from_bytes(digest, "little"))

    def operator_settings(self, place: str, here: Sequence[int] | None = None) -> Settings:
        density = [self.density[index] for index in here] if here is not None and self.density else self.density
        return Settings(density, self.settings.majority_sign_method or "total", self.generator(place))

    def modules(self) -> Iterator[tuple[str, list[int], SiteShape]]:
        """Each module any adapter adapts: its name, which adapters do, and its shape."""
        names = sorted({module for source in self.sources for module in source.paths}, key=_natural)
        for name in names:
            here = [index for index, source in enumerate(self.sources) if name in source.paths]
            shapes = [self.sources[index].adapter(name).shape for index in here]
            yield name, here, max(shapes, key=lambda shape: min(shape.matrix))

    # -- scales ---------------------------------------------------------------------------------------------------

    def scales(self, writer: TensorWriter) -> tuple[Any, list[ModuleReport]]:
        """IA3: writes the merged scales; gives the config."""
        check_scales(self.sources, self.settings.method)
        centre = 1.0 if self.settings.space == "delta" else 0.0
        names = []
        for name, _, _ in self.modules():
            names.append(name)
            operator, settings = self.settings.operator, self.operator_settings(name)
            writer.add(*merged_scale(name, self.sources, self.weights, operator, settings, centre=centre))
        return scale_config(self.sources, names), []

    # -- matrices -------------------------------------------------------------------------------------------------

    def matrices(self, writer: TensorWriter) -> tuple[Any, list[ModuleReport]]:
        """Writes LoRA factors of the merged updates; gives the config."""
        modules = list(self.modules())
        ranks: dict[str, int] = {}
        rows = []
        for name, here, shape in modules:
            merged, row = self._module(name, here)
            for key, tensor in module_tensors(shape, merged, row.rank, [module for module, _, _ in modules]).items():
                writer.add(key, tensor)
            ranks[name] = row.rank
            rows.append(row)
        configs = [source.config for source in self.given]
        fields = copy_fields(self.given) | token_fields(self.given)
        if self.base is not None:
            fields["fan_in_fan_out"] = any(
                self.base.stores_transposed(shape) for _, _, shape in modules if shape.kind == "linear"
            )
        return lora_config(configs, ranks, **fields), rows

    def _module(self, name: str, here: list[int]) -> tuple[list[LowRank], ModuleReport]:
        """The merged product at a module, or one for each expert fused in it, and what to say about it."""
        merged, conflicts = [], []
        products = numpy.zeros((len(here), len(here)))
        for updates in zip(*(self.sources[index].updates(name) for index in here), strict=True):
            low = [update for update in updates if isinstance(update, LowRank)]
            stacked = stack(low) if len(low) == len(updates) else None
            products += inner_products(updates, stacked)
            merged.append(self._merged(name, here, list(updates), stacked))
            if len(updates) > 1:
                conflicts.append(sign_conflicts(updates, [self.weights[index] for index in here]))
        self._products[numpy.ix_(here, here)] += products
        return [part.factors for part in merged], self._row(name, here, products.diagonal(), merged, conflicts)

    def _merged(self, name: str, here: list[int], updates: list[Update], stacked: LowRank | None) -> Compressed:
        method, rank = self.settings.method, self.settings.rank
        weights = [self.weights[index] for index in here]
        if self.settings.space == "factors" and method not in SVD_TYPES:
            return self._in_factors(name, here, rank, stacked)
        if self.settings.operator == "linear" and stacked is not None:
            ranks = [update.rank for update in updates]
            total = stacked.weighted(numpy.repeat(weights, ranks))
            if method == "cat" and rank is None:
                return Compressed(total, 1.0, total.norm())
            rank = rank or (self._default_rank(updates) if method == "svd" else Rank())
            return compress(total, rank, self.generator(name))
        operator = OPERATORS[self.settings.operator]
        matrix = operator([update.dense() for update in updates], weights, self.operator_settings(name, here))
        return compress(DenseUpdate(matrix, 1), rank or self._default_rank(updates), self.generator(name))

    def _default_rank(self, updates: list[Update]) -> Rank:
        """Of a merged matrix: the parents' ranks together, or for the `svd` types the largest of them.

        In factor space PEFT's rule: the largest `r` of all adapters, also of those that leave the module alone.
        """
        if self.settings.space == "factors":
            return Rank(number=max(getattr(source.config, "r", 1) for source in self.sources))
        ranks = [update.rank for update in updates]
        return Rank(number=max(ranks) if self.settings.method in SVD_TYPES else sum(ranks))

    def _in_factors(self, name: str, here: list[int], rank: Rank | None, stacked: LowRank | None) -> Compressed:
        factors, scalings = [], []
        for index in here:
            source = self.sources[index]
            adapter = source.adapter(name)
            if not is_plain_lora(adapter):
                raise InputError(
                    f"{source.what} has no factors A and B alone to merge", place=source.folder, fix="--space delta"
                )
            pair = source.pair(name, cast(Lora, adapter))
            factors.append((pair.a, pair.b))
            scalings.append(self.weights[index] * adapter.scaling)
        a, b = combine_factors(factors, scalings, self.settings.method, self.operator_settings(name, here), place=name)
        product = LowRank(a, b)
        if rank:
            return compress(product, rank, self.generator(name))
        same = product
        if self.settings.method == "cat" and stacked is not None:  # the exact sum, whose Gram matrices are known
            same = stacked.weighted(numpy.repeat([self.weights[index] for index in here], [len(a) for a, _ in factors]))
        return Compressed(product, 1.0, same.norm())

    # -- what is trained in full ----------------------------------------------------------------------------------

    def full_weights(self, writer: TensorWriter, base: BaseWeights) -> None:
        """Writes modules and biases trained in full, and trainable tokens."""
        operator = self.settings.operator
        modules = {module for source in self.sources for module in source.paths}
        for name in sorted({name for source in self.sources for name in source.copies}):
            how = self.operator_settings(name)
            writer.add(copy_key(name, modules), merged_copy(name, self.sources, self.weights, operator, how, base))
        for module, tokens in token_modules(self.sources).items():
            how = self.operator_settings(module)
            writer.add(*merged_rows(module, tokens, self.sources, self.weights, operator, how, base))

    # -- report ---------------------------------------------------------------------------------------------------

    def _row(
        self, name: str, here: list[int], squares: NDArray[Any], merged: list[Compressed], conflicts: list[float]
    ) -> ModuleReport:
        norms: list[float | None] = [None] * len(self.sources)
        for index, square in zip(here, squares, strict=True):
            norms[self.given.index(self.sources[index])] = float(max(square, 0.0) ** 0.5)
        total = sum(part.norm**2 for part in merged)
        energy = sum(part.energy * part.norm**2 for part in merged) / total if total > 0 else 1.0
        rank = max(part.factors.rank for part in merged)
        contested = sum(conflicts) / len(conflicts) if conflicts else None
        return ModuleReport(name, rank, total**0.5, energy, contested, norms)

    def report(self, rows: list[ModuleReport], config: Any) -> MergeReport:
        """What the merge came to, adapters in the order they were named in."""
        order = [self.sources.index(source) for source in self.given]
        size = numpy.sqrt(self._products.diagonal().clip(0))
        scale = numpy.outer(size, size).clip(1e-300)
        cosines = (self._products / scale)[numpy.ix_(order, order)].tolist()
        return MergeReport.of(self.given, self.settings, rows, config, cosines=cosines if rows else [])


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]
