"""The training or the evaluation samples while they are gathered: which row and source each came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftcli.data.collate import IGNORED
from peftcli.data.report import SourceReport
from peftcli.data.tokens import TokenDataset
from peftcli.errors import InputError
from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from peftcli.recipe.schema import DataSource


class Part:
    """Samples of one part, with what is needed to hold some out, repeat some and count duplicates.

    Args:
        name: `train` or `eval`.
        recipe: its sources.

    Attributes:
        dataset: the samples.
        sources: a report for each source.
        weights: weight of each source.
        digests: hash of each kept row's tokens.
        row_of, source_of: for each sample, the index of its row and of its source.
    """

    def __init__(self, name: str, recipe: Sequence[DataSource]) -> None:
        self.name, self.recipe = name, recipe
        self.dataset = TokenDataset.from_samples([])
        self.sources = [SourceReport(source.path) for source in recipe]
        self.weights = [source.weight for source in recipe]
        self.digests: list[bytes] = []
        self.row_of: list[int] = []
        self.source_of: list[int] = []
        self._overlong, self._longest, self._first_overlong = 0, 0, ""

    @property
    def duplicates(self) -> int:
        """Rows that are the same, token by token, as an earlier one."""
        return len(self.digests) - len(set(self.digests))

    def add_row(self, digest: bytes, samples: int, source: int) -> None:
        """Note a row of the source of that number."""
        self.row_of += [len(self.digests)] * samples
        self.source_of += [source] * samples
        self.digests.append(digest)

    def note_overlong(self, length: int, place: str) -> None:
        """Note a sample that is too long, to be refused once it is known how many there are."""
        self._first_overlong = self._first_overlong or place
        self._overlong += 1
        self._longest = max(self._longest, length)

    def refuse_overlong(self, max_length: int) -> None:
        """Raises:
        InputError: samples were too long.
        """
        if self._overlong:
            raise InputError(
                f"samples longer than {max_length} tokens: {self._overlong}, the longest {self._longest}",
                place=self._first_overlong,
                field=f"data.{self.name}: data.max_length",
                fix=f"set data.max_length to {self._longest}, or data.overflow to drop, truncate or split",
            )

    def nothing_left(self) -> InputError:
        """The error for a part of which no sample was kept."""
        counts = {
            "with nothing but blanks in the completion": sum(source.blank for source in self.sources),
            "longer than data.max_length": sum(source.too_long for source in self.sources),
            "without a learnt token once cut to data.max_length": sum(source.unlabelled for source in self.sources),
        }
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        rows = sum(source.rows for source in self.sources)
        return InputError(
            f"no token is left to learn: of {rows} rows, {reasons}",
            place=self.sources[0].path,
            field=f"data.{self.name}",
        )

    def split(self, fraction: float, generator: np.random.Generator) -> tuple[Part, Part]:
        """This part without, and a new one with, a random `fraction` of the rows.

        Equal rows stay together, so that no example is both trained on and evaluated.

        Raises:
            InputError: there are no two different rows.
        """
        distinct = list(dict.fromkeys(self.digests))
        if len(distinct) < 2:
            raise InputError(
                "a data set of one row can't be split",
                place=self.sources[0].path,
                field="data.eval.split",
                fix="add data, or leave data.eval out",
            )
        count = min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)
        chosen = {distinct[index] for index in generator.choice(len(distinct), count, replace=False)}
        held_out = np.array([self.digests[row] in chosen for row in self.row_of])
        return self._take(self.name, ~held_out), self._take("eval", held_out, weighted=False)

    def _take(self, name: str, keep: NDArray[np.bool_], weighted: bool = True) -> Part:
        part = Part(name, self.recipe)
        indices = np.flatnonzero(keep)
        part.dataset = self.dataset.select(indices)
        part.sources, part.weights = self.sources, self.weights if weighted else [1.0] * len(self.weights)
        part.source_of = [self.source_of[index] for index in indices]
        rows = list(dict.fromkeys(self.row_of[index] for index in indices))
        renumbered = {row: number for number, row in enumerate(rows)}
        part.row_of = [renumbered[self.row_of[index]] for index in indices]
        part.digests = [self.digests[row] for row in rows]
        return part

    def repeat_by_weight(self, generator: np.random.Generator) -> None:
        """Let each sample come as often as its source's weight says; of a fractional one, a random part comes again.

        Windows of one question come together, and a question that comes again is another one.

        Raises:
            InputError: the weights leave no sample.
        """
        if set(self.weights) == {1.0}:
            return
        questions = self.dataset.questions
        source_of = np.array([self.source_of[question[0]] for question in questions])
        chosen = []
        for index, weight in enumerate(self.weights):
            own = np.flatnonzero(source_of == index)
            extra = generator.choice(own, round(weight % 1 * len(own)), replace=False)
            chosen += [own] * int(weight) + [np.sort(extra)]
        again = [questions[number] for number in np.concatenate(chosen)]
        self.dataset = self.dataset.select([index for question in again for index in question])
        if not len(self.dataset):
            raise InputError("the weights of the sources leave no sample", field=f"data.{self.name}")
        if (windows := self.dataset.windows) is not None:
            numbers = np.repeat(np.arange(len(again)), [len(question) for question in again])
            windows[:, 0] = np.where(windows[:, 0] == IGNORED, IGNORED, numbers)
