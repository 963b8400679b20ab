"""A tokenised data set as flat columns, the form it has on disk and in memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from peftcli.data.collate import IGNORED
from peftcli.files import write_atomically
from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Sample: TypeAlias = "tuple[NDArray[np.int32], NDArray[np.bool_]]"


class TaskSample(NamedTuple):
    """A sample of a task other than predicting the next token.

    Args:
        ids: [T] int32.
        supervised: [T] bool, the tokens that are learnt, where tokens are.
        second: index at which a second sequence begins (the target, the positive, the rejected answer); 0: there is none.
        segment: index at which BERT's second segment begins; 0: there is none.
        targets: what the sample as a whole has to give: a class, or the first and last token of an answer and of further
            ones that are right, too.
        tags: [T] int32, the class of each supervised token.
        window: where a text was cut into several samples: the number of the text, how many of its tokens were left out
            before this part, the index at which this part begins, and the targets in the uncut sample.
    """

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    second: int = 0
    segment: int = 0
    targets: tuple[int, ...] = ()
    tags: NDArray[np.int32] | None = None
    window: tuple[int, ...] = ()


def is_learnt(sample: Sample | TaskSample) -> bool:
    """Whether there is anything to learn from a sample."""
    return bool(sample[1].any()) or (isinstance(sample, TaskSample) and bool(sample.targets))


class TokenDataset:
    """Samples laid end to end: sample i is `input_ids[offsets[i]:offsets[i + 1]]`.

    Args:
        input_ids: [tokens] int32.
        supervised: [tokens] bool; token t of a sample is a label of the next-token loss where this is true. Never true
            at t = 0, which nothing predicts, so `supervised.sum()` is the exact number of labels.
        offsets: [samples + 1] int64, from 0 to the number of tokens.
        tasks: [samples] int64, the task each sample is of; None where there is only one.
        second, segment: [samples] int64; targets, windows: [samples, K] int64, filled up with `IGNORED`; tags: [tokens]
            int32; see `TaskSample`. None where the task has none.
    """

    def __init__(
        self,
        input_ids: NDArray[np.int32],
        supervised: NDArray[np.bool_],
        offsets: NDArray[np.int64],
        tasks: NDArray[np.int64] | None = None,
        *,
        second: NDArray[np.int64] | None = None,
        segment: NDArray[np.int64] | None = None,
        targets: NDArray[np.int64] | None = None,
        tags: NDArray[np.int32] | None = None,
        windows: NDArray[np.int64] | None = None,
    ) -> None:
        if len(input_ids) != len(supervised) or offsets[0] != 0 or offsets[-1] != len(input_ids):
            raise ValueError("the columns of a TokenDataset do not fit together")
        for column, length in ((tasks, len(offsets) - 1), (second, len(offsets) - 1), (segment, len(offsets) - 1),
                               (targets, len(offsets) - 1), (windows, len(offsets) - 1), (tags, len(input_ids))):  # fmt: skip
            if column is not None and len(column) != length:
                raise ValueError(f"a column of {len(column)} entries, not {length}")
        self.input_ids, self.supervised, self.offsets, self.tasks = input_ids, supervised, offsets, tasks
        self.second, self.segment, self.targets, self.tags = second, segment, targets, tags
        self.windows = windows

    @classmethod
    def from_samples(cls, samples: Iterable[Sample | TaskSample]) -> TokenDataset:
        """Lay samples end to end, one after another: an iterator is never held in memory whole."""
        input_ids, supervised, offsets = array("i"), bytearray(), array("q", [0])
        second, segment, tags = array("q"), array("q"), array("i")
        targets, windows = _Ragged(), _Ragged()
        for sample in samples:
            ids, mask = sample[:2]
            input_ids.frombytes(np.asarray(ids, np.int32).tobytes())
            supervised += np.asarray(mask, np.bool_).tobytes()
            offsets.append(len(input_ids))
            if isinstance(sample, TaskSample):
                second.append(sample.second)
                segment.append(sample.segment)
                targets.append(sample.targets)
                windows.append(sample.window)
                if sample.tags is not None:
                    tags.frombytes(np.asarray(sample.tags, np.int32).tobytes())
        return cls(
            np.frombuffer(input_ids, np.int32),
            np.frombuffer(supervised, np.bool_),
            np.frombuffer(offsets, np.int64),
            second=np.frombuffer(second, np.int64) if any(second) else None,
            segment=np.frombuffer(segment, np.int64) if any(segment) else None,
            targets=targets.table(),
            windows=windows.table(),
            tags=np.frombuffer(tags, np.int32) if tags else None,
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Sample:
        """Views `(ids [T] int32, supervised [T] bool)` of one sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.input_ids[span], self.supervised[span]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[samples] tokens of each sample."""
        return np.diff(self.offsets)

    @property
    def label_counts(self) -> NDArray[np.int64]:
        """[samples] supervised tokens of each sample."""
        before = np.concatenate([[0], np.cumsum(self.supervised, dtype=np.int64)])
        return np.diff(before[self.offsets])

    @property
    def units(self) -> NDArray[np.int64]:
        """[samples] what the loss is a mean over: the sample where it is judged as a whole, else its learnt tokens."""
        return self.label_counts if self.targets is None else np.ones(len(self), np.int64)

    @property
    def questions(self) -> list[list[int]]:
        """The samples of each question: the windows of a text that was cut, else one."""
        if self.windows is None:
            return [[index] for index in range(len(self))]
        found: dict[tuple[int, int], list[int]] = {}
        for index, text in enumerate(self.windows[:, 0].tolist()):
            found.setdefault((text, index if text == IGNORED else 0), []).append(index)
        return list(found.values())

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> TokenDataset:
        """A copy with the samples at `indices`, in that order; an index may come more than once."""
        order = np.asarray(indices, np.int64)
        chosen = TokenDataset.from_samples(self[int(index)] for index in order)
        for name in ("tasks", "second", "segment", "targets", "windows"):
            column = getattr(self, name)
            setattr(chosen, name, None if column is None else column[order])
        if self.tags is not None:
            spans = [self.tags[self.offsets[index] : self.offsets[index + 1]] for index in order]
            chosen.tags = np.concatenate(spans) if spans else self.tags[:0]
        return chosen

    def columns(self) -> dict[str, NDArray[np.generic]]:
        """All that there is, by the constructor's names."""
        names = ("input_ids", "supervised", "offsets", "tasks", "second", "segment", "targets", "tags", "windows")
        return {name: column for name in names if (column := getattr(self, name)) is not None}

    def save(self, path: Path) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        from safetensors.numpy import save

        columns = {name: np.ascontiguousarray(column) for name, column in self.columns().items()}
        write_atomically(path, save(columns))

    @classmethod
    def load(cls, path: Path) -> TokenDataset:
        """Read what `save` wrote."""
        from safetensors.numpy import load_file

        return cls(**load_file(path))


class _Ragged:
    """Rows of numbers, each as long as it is, laid end to end until there is a table of them."""

    def __init__(self) -> None:
        self._values, self._widths = array("q"), array("q")

    def append(self, row: tuple[int, ...]) -> None:
        self._values.extend(row)
        self._widths.append(len(row))

    def table(self) -> NDArray[np.int64] | None:
        """[rows, widest], filled up with `IGNORED`; None if all rows are empty."""
        if not self._values:
            return None
        widths = np.frombuffer(self._widths, np.int64)
        table = np.full((len(widths), int(widths.max())), IGNORED, np.int64)
        table[np.arange(table.shape[1]) < widths[:, None]] = np.frombuffer(self._values, np.int64)
        return table
