"""Rows of the sources of one part of the data to its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeAlias

from peftcli.data.encoder import Encoder
from peftcli.data.formats import FORMATS, detect, parse_row
from peftcli.data.part import Part
from peftcli.data.report import SourceReport
from peftcli.data.sources import PART_SPLITS, read_source
from peftcli.data.task_encoders import TaskEncoder
from peftcli.data.tokens import TaskSample, TokenDataset, is_learnt
from peftcli.errors import InputError
from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from peftcli.data.readers import Row
    from peftcli.data.tokens import Sample
    from peftcli.recipe.schema import DataSection, DataSource

Progress: TypeAlias = Callable[[str, int], None]
"""Called with a source's path and the number of its rows done."""

ROWS_PER_REPORT = 100


class PartReader:
    """Reads the sources of one part after another with the same settings.

    Args:
        data: the recipe's section.
        task: a key of `formats.TASK_FORMATS`.
        encoder: makes samples of examples.
        has_template: whether the tokenizer has a chat template.
        progress: is told how far it got.
    """

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
        part = Part(name, sources)
        rows = ((index, row) for index in range(len(sources)) for row in self._rows_of(part, index))
        self.fill(part, rows)
        if not len(part.dataset):
            raise part.nothing_left()
        return part

    def fill(self, part: Part, rows: Iterable[tuple[int, Row]]) -> None:
        """Make the samples of rows, each with the number of its source, and put them into `part`.

        Raises:
            InputError: a row that can't be used, or samples that are too long.
        """
        with self.located(part.name):
            samples = (sample for index, row in rows for sample in self._samples(part, index, row))
            part.dataset = TokenDataset.from_samples(samples)
        part.refuse_overlong(self._data.max_length)
        if any(source.task for source in part.recipe):
            part.dataset.tasks = np.array([part.recipe[index].task for index in part.source_of], np.int64)

    @staticmethod
    @contextmanager
    def located(name: str) -> Iterator[None]:
        """Errors name the part of the data they are about."""
        try:
            yield
        except InputError as error:
            field = f"data.{name}: {error.field}" if error.field else f"data.{name}"
            raise error.at(field=field) from error

    def note(self, part: Part, index: int, row: Row) -> None:
        """Count a row of a source; its first one decides format and form."""
        if not part.sources[index].rows:
            self._settle(part.sources[index], part.recipe[index], row)
        part.sources[index].rows += 1

    def _rows_of(self, part: Part, index: int) -> Iterator[Row]:
        """The rows of one source; progress is told."""
        source, report = part.recipe[index], part.sources[index]
        for row in read_source(source, PART_SPLITS[part.name], stream=self._data.streaming and part.name == "train"):
            yield row
            if self._progress and report.rows % ROWS_PER_REPORT == 0:
                self._progress(source.path, report.rows)
        if not report.rows:
            raise InputError("is empty: it has no rows", place=source.path)
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

    def _samples(self, part: Part, index: int, row: Row) -> Iterator[Sample | TaskSample]:
        self.note(part, index, row)
        report = part.sources[index]
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
            part.add_row(digest, len(kept), index)
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


def _content(sample: Sample | TaskSample) -> Iterator[NDArray[np.generic]]:
    """What makes two samples the same: their tokens, and what they have to give."""
    yield sample[0]
    if isinstance(sample, TaskSample):
        yield np.array([sample.second, *sample.targets], np.int64)
        if sample.tags is not None:
            yield sample.tags
