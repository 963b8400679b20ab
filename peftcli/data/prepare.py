"""Data sources to tokenised data sets in the run folder: done once, in the front process, before anything is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from peftcli.data.audit import all_sources, audit
from peftcli.data.encoder import Encoder
from peftcli.data.formats import FORMATS, detect, parse_row
from peftcli.data.part import Part
from peftcli.data.report import DataReport, PartReport, SourceReport, choose_pad, warnings
from peftcli.data.sources import PART_SPLITS, read_source
from peftcli.data.task_encoders import ENCODERS, TaskEncoder
from peftcli.data.tokens import TaskSample, TokenDataset, is_learnt
from peftcli.errors import InputError, printable
from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from peftcli.data.readers import Row
    from peftcli.data.tokens import Sample
    from peftcli.recipe.schema import DataSection, DataSource

Progress: TypeAlias = Callable[[str, int], None]
"""Called with a source's path and the number of its rows done."""

ROWS_PER_REPORT = 100
TRAIN, EVAL, AUDIT = WRITTEN = ("train.safetensors", "eval.safetensors", "audit.json")
"""What `prepare` writes; the second only where there is evaluation data."""


@dataclass(frozen=True)
class Prepared:
    """Tokenised data and what is known about it.

    Args:
        train, eval: the samples.
        report: the audit and all counts.
        cache: what was done with the cache of tokenised data, for people.
    """

    train: TokenDataset
    eval: TokenDataset | None
    report: DataReport
    cache: str = ""

    @classmethod
    def load(cls, folder: Path) -> Prepared:
        """Read what `prepare` wrote."""
        train, held_out, audit = (folder / name for name in WRITTEN)
        return cls(
            TokenDataset.load(train),
            TokenDataset.load(held_out) if held_out.exists() else None,
            DataReport.load(audit),
        )


def prepare(
    data: DataSection,
    tokenizer: Any,
    *,
    folder: Path,
    seed: int,
    task: str = "CAUSAL_LM",
    labels: Sequence[str] | None = None,
    vocab_size: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Read, check and tokenise everything; write the files of `WRITTEN`.

    Args:
        data: the recipe's section, paths absolute.
        tokenizer: a transformers tokenizer with a fast backend.
        folder: an existing folder; nothing is written to it unless all is well.
        seed: decides which samples are held out, and which are taken by a fractional `weight`.
        task: a key of `formats.TASK_FORMATS`: a task type, or `preference`.
        labels: the classes in their order; None: those of the training data.
        vocab_size: rows of the model's embedding; a token beyond them is refused.
        progress: is told how far it got.

    Raises:
        InputError: the first row or file that can't be used as it is, or data of which nothing is left to learn.
    """
    encoder = _encoder(task, tokenizer, data, labels)
    read = _Reader(data, task, encoder, bool(tokenizer.chat_template), progress).read
    generator = np.random.default_rng(seed)
    train, held_out = read("train", data.train), None
    if isinstance(data.eval, tuple):
        if encoder.labels:
            encoder.labels.close()
        held_out = read("eval", data.eval)
    elif data.eval is not None:
        train, held_out = train.split(data.eval.split, generator)
    names = _settle([part for part in (train, held_out) if part], encoder, tokenizer)
    for part in (train, held_out):
        if part is not None:
            part.repeat_by_weight(generator)
            _check_ids(part.dataset, tokenizer, vocab_size)
    prepared = Prepared(
        train.dataset,
        held_out.dataset if held_out else None,
        _report(train, held_out, encoder, tokenizer, names),
    )
    _write(prepared, folder)
    return prepared


def _encoder(task: str, tokenizer: Any, data: DataSection, labels: Sequence[str] | None) -> Encoder | TaskEncoder:
    if task == "CAUSAL_LM":
        return Encoder(tokenizer, data.loss_on)
    return ENCODERS[task](tokenizer, labels, data.loss_on)


def _settle(parts: list[Part], encoder: Encoder | TaskEncoder, tokenizer: Any) -> list[str] | None:
    """Bring the classes into their final order, and return their names."""
    for part in parts:
        if "token_type_ids" not in tokenizer.model_input_names:
            part.dataset.segment = None
    if encoder.labels is None:
        return None
    names, final = encoder.labels.settle()
    for dataset in (part.dataset for part in parts):
        if dataset.targets is not None:
            dataset.targets = final[dataset.targets]
        if dataset.tags is not None:
            dataset.tags = final[dataset.tags].astype(np.int32)
    return names


def _content(sample: Sample | TaskSample) -> Iterator[NDArray[np.generic]]:
    """What makes two samples the same: their tokens, and what they have to give."""
    yield sample[0]
    if isinstance(sample, TaskSample):
        yield np.array([sample.second, *sample.targets], np.int64)
        if sample.tags is not None:
            yield sample.tags


def _check_ids(dataset: TokenDataset, tokenizer: Any, vocab_size: int | None) -> None:
    highest = int(dataset.input_ids.max())
    if vocab_size is not None and highest >= vocab_size:
        raise InputError(
            f"the data holds the token {printable(tokenizer.convert_ids_to_tokens(highest))!r} with id {highest}, but "
            f"the model embeds only {vocab_size} tokens",
            field="model.name_or_path",
            fix="use the tokenizer the model was trained with, or leave the token out of the data",
        )


def _report(
    train: Part, held_out: Part | None, encoder: Encoder | TaskEncoder, tokenizer: Any, labels: list[str] | None
) -> DataReport:
    pad_token_id = choose_pad(tokenizer)
    known = set(train.digests)
    overlap = sum(digest in known for digest in held_out.digests) if held_out else 0
    told, told_held_out = PartReport.of(train), PartReport.of(held_out) if held_out else None
    return DataReport(
        train=told,
        eval=told_held_out,
        overlap=overlap,
        labels=labels,
        pad_token_id=pad_token_id,
        audit=audit(encoder.notes, tokenizer, pad_token_id, told, told_held_out, overlap),
        warnings=list(warnings(encoder.notes, all_sources(told, told_held_out))),
    )


def _write(prepared: Prepared, folder: Path) -> None:
    prepared.train.save(folder / TRAIN)
    (folder / EVAL).unlink(missing_ok=True)  # of an earlier run that this one overwrites
    if prepared.eval is not None:
        prepared.eval.save(folder / EVAL)
    prepared.report.save(folder / AUDIT)


class _Reader:
    """Reads the sources of one part after another with the same settings."""

    def __init__(
        self,
        data: DataSection,
        task: str,
        encoder: Encoder | TaskEncoder,
        has_template: bool,
        progress: Progress | None,
    ) -> None:
        self._data, self._task, self._encoder = data, task, encoder
        self._has_template, self._progress = has_template, progress

    def read(self, name: str, sources: tuple[DataSource, ...]) -> Part:
        """All samples of the training or evaluation data.

        Raises:
            InputError: a source without rows, a row that can't be used, samples that are too long (`overflow: error`),
                or no sample left; `field` names the part.
        """
        part = Part(name)
        part.dataset = TokenDataset.from_samples(sample for source in sources for sample in self._samples(part, source))
        part.refuse_overlong(self._data.max_length)
        if not len(part.dataset):
            raise part.nothing_left()
        if any(source.task for source in sources):
            part.dataset.tasks = np.array([sources[index].task for index in part.source_of], np.int64)
        return part

    def _samples(self, part: Part, source: DataSource) -> Iterator[Sample | TaskSample]:
        """The samples of one source, noted in `part` as they pass."""
        report = SourceReport(source.path)
        part.sources.append(report)
        part.weights.append(source.weight)
        place = f"data.{part.name}"
        try:
            for row in read_source(source, PART_SPLITS[part.name]):
                if not report.rows:
                    self._settle(report, source, row)
                report.rows += 1
                yield from self._samples_of_row(part, report, row)
                if self._progress and report.rows % ROWS_PER_REPORT == 0:
                    self._progress(source.path, report.rows)
        except InputError as error:
            field = f"{place}: {error.field}" if error.field else place
            raise InputError(
                error.problem, place=error.place, field=field, allowed=error.allowed, fix=error.fix
            ) from error
        if not report.rows:
            raise InputError("is empty: it has no rows", place=source.path, field=place)
        if self._progress:
            self._progress(source.path, report.rows)

    def _settle(self, report: SourceReport, source: DataSource, row: Row) -> None:
        """Format and form of a source, by its first row."""
        named = source.format or self._data.format
        report.format = detect(row.values, row.place, self._task) if named == "auto" else named
        format = FORMATS[report.format]
        report.ignored_columns = sorted(set(row.values) - {*format.required, *format.optional})
        optional = format.template == "optional" and self._data.apply_chat_template and self._has_template
        report.templated = format.template == "always" or optional

    def _samples_of_row(self, part: Part, report: SourceReport, row: Row) -> Iterator[Sample | TaskSample]:
        example = parse_row(report.format, row.values, row.place, report.templated)
        samples = self._encoder.encode(example, row.place)
        if not samples:
            report.blank += 1
            return
        digest = blake2b(
            b"|".join(column.tobytes() for sample in samples for column in _content(sample)), digest_size=16
        ).digest()
        kept = [piece for sample in samples for piece in self._fitting(part, report, sample, row.place)]
        if kept:
            part.add_row(digest, len(kept))
            report.samples += len(kept)
        yield from kept

    def _fitting(self, part: Part, report: SourceReport, sample: Any, place: str) -> list[Any]:
        """`sample` if it is short enough, or what `overflow` makes of it."""
        longest, overflow = self._data.max_length, self._data.overflow
        length = self._encoder.length(sample)
        if length <= longest:
            return [sample]
        if overflow == "error":
            part.note_overlong(length, place)
            return []
        if overflow == "drop":
            report.too_long += 1
            report.note_loss(sample, [], split=False)
            return []
        report.truncated += 1
        pieces = self._encoder.pieces(sample, longest, split=overflow == "split")
        kept = [piece for piece in pieces if is_learnt(piece)]
        report.unlabelled += max(len(pieces), 1) - len(kept)
        report.note_loss(sample, kept, split=overflow == "split")
        return kept
