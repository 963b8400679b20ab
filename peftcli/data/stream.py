"""Training data that are never held whole: chunks of rows, read one after another, tokenised when it is their turn.

Every process reads all rows and makes the same chunks, and takes its own batches of each: none waits for another, and
all see a bad row at the same moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.data.part import Part
from peftcli.data.part_reader import PartReader
from peftcli.data.prepare import check_ids, make_encoder, settle_classes
from peftcli.data.sources import PART_SPLITS, read_source

if TYPE_CHECKING:
    from peftcli.data.readers import Row
    from peftcli.data.tokens import TokenDataset
    from peftcli.recipe.schema import DataSection

SETTINGS = ("format", "max_length", "overflow", "loss_on", "apply_chat_template", "buffer_size")
"""Of the data section, what decides the chunks."""


class Stream:
    """The training data of a recipe as chunks of `data.buffer_size` rows, those of several sources in turn.

    Args:
        data, tokenizer, task, labels, vocab_size: as for `prepare`.
    """

    def __init__(
        self,
        data: DataSection,
        tokenizer: Any,
        *,
        task: str = "CAUSAL_LM",
        labels: Sequence[str] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self._data, self._tokenizer, self._vocab_size = data, tokenizer, vocab_size
        self._encoder = make_encoder(task, tokenizer, data, labels)
        self._reader = PartReader(data, task, self._encoder, bool(tokenizer.chat_template), None)
        self._at = (-1, 0)  # epoch, and the chunk that is read next
        self._rows: Iterator[tuple[int, Row]] = iter(())
        self._ahead: tuple[int, Row] | None = None
        self._sources = Part("train", data.train).sources

    def chunk(self, epoch: int, number: int) -> tuple[TokenDataset, bool]:
        """The samples of one chunk, perhaps none, and whether it is the epoch's last. In order, nothing is read twice.

        Raises:
            InputError: a row that can't be used.
        """
        if (epoch, number) != self._at:
            self._open(number)
        part = Part("train", self._data.train)
        part.sources = self._sources  # the first row of each has decided its format
        self._reader.fill(part, self._next_rows(self._data.buffer_size))
        settle_classes([part], self._encoder, self._tokenizer)
        if len(part.dataset):
            check_ids(part.dataset, self._tokenizer, self._vocab_size)
        self._at = (epoch, number + 1)
        return part.dataset, self._ahead is None

    def identity(self) -> dict[str, Any]:
        """By recipe field, what a resumed run must share with the one it continues, beside the first rows."""
        values = self._data.model_dump(mode="json")
        paths = [Path(source.path) for source in self._data.train]
        sizes = [path.stat().st_size for path in paths if path.is_file()]
        weights = [source.weight for source in self._data.train]
        return {
            **{f"data.{name}": values[name] for name in SETTINGS},
            "data.train (weight)": weights,
            "data.train (bytes)": sizes,
        }

    def _open(self, number: int) -> None:
        """Begin at the first row, and pass over the chunks before `number`."""
        part = Part("train", self._data.train)
        self._sources, self._rows = part.sources, self._in_turn()
        with self._reader.located("train"):
            self._ahead = next(self._rows, None)
            for index, row in self._next_rows(number * self._data.buffer_size):
                self._reader.note(part, index, row)

    def _next_rows(self, count: int) -> Iterator[tuple[int, Row]]:
        while self._ahead is not None and count > 0:
            yield self._ahead
            self._ahead, count = next(self._rows, None), count - 1

    def _in_turn(self) -> Iterator[tuple[int, Row]]:
        """A row of each source, and again, until all have ended; each with its source's number."""
        splits = PART_SPLITS["train"]
        open_ones = [
            (index, weighted(read_source(source, splits, stream=True), source.weight))
            for index, source in enumerate(self._data.train)
        ]
        while open_ones:
            for one in list(open_ones):
                index, rows = one
                found = list(islice(rows, 1))
                if found:
                    yield index, found[0]
                else:
                    open_ones.remove(one)


def weighted(rows: Iterator[Row], weight: float) -> Iterator[Row]:
    """Each row as often as the weight of its source says; of a fractional one, evenly spaced rows come once more."""
    for number, row in enumerate(rows):
        for _ in range(int((number + 1) * weight + 0.5) - int(number * weight + 0.5)):
            yield row
