"""A tokenised data set as flat columns, the form it has on disk and in memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from peftcli.files import write_atomically
from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Sample: TypeAlias = "tuple[NDArray[np.int32], NDArray[np.bool_]]"


class TokenDataset:
    """Samples laid end to end: sample i is `input_ids[offsets[i]:offsets[i + 1]]`.

    Args:
        input_ids: [tokens] int32.
        supervised: [tokens] bool; token t of a sample is a label of the next-token loss where this is true. Never true
            at t = 0, which nothing predicts, so `supervised.sum()` is the exact number of labels.
        offsets: [samples + 1] int64, from 0 to the number of tokens.
        tasks: [samples] int64, the task each sample is of; None where there is only one.
    """

    def __init__(
        self,
        input_ids: NDArray[np.int32],
        supervised: NDArray[np.bool_],
        offsets: NDArray[np.int64],
        tasks: NDArray[np.int64] | None = None,
    ) -> None:
        if len(input_ids) != len(supervised) or offsets[0] != 0 or offsets[-1] != len(input_ids):
            raise ValueError("the columns of a TokenDataset do not fit together")
        if tasks is not None and len(tasks) != len(offsets) - 1:
            raise ValueError(f"{len(tasks)} tasks for {len(offsets) - 1} samples")
        self.input_ids, self.supervised, self.offsets, self.tasks = input_ids, supervised, offsets, tasks

    @classmethod
    def from_samples(cls, samples: Iterable[Sample]) -> TokenDataset:
        """Lay `(ids, supervised)` pairs end to end, one after another: an iterator is never held in memory whole."""
        input_ids, supervised, offsets = array("i"), bytearray(), array("q", [0])
        for ids, mask in samples:
            input_ids.frombytes(np.asarray(ids, np.int32).tobytes())
            supervised += np.asarray(mask, np.bool_).tobytes()
            offsets.append(len(input_ids))
        return cls(
            np.frombuffer(input_ids, np.int32), np.frombuffer(supervised, np.bool_), np.frombuffer(offsets, np.int64)
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

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> TokenDataset:
        """A copy with the samples at `indices`, in that order; an index may come more than once."""
        chosen = TokenDataset.from_samples(self[int(index)] for index in indices)
        chosen.tasks = None if self.tasks is None else self.tasks[np.asarray(indices, np.int64)]
        return chosen

    def columns(self) -> list[NDArray[np.generic]]:
        """All that there is, in the order of the constructor."""
        columns: list[NDArray[np.generic]] = [self.input_ids, self.supervised, self.offsets]
        return columns if self.tasks is None else [*columns, self.tasks]

    def save(self, path: Path) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        from safetensors.numpy import save

        names = ("input_ids", "supervised", "offsets", "tasks")
        columns = dict(zip(names, self.columns(), strict=False))
        write_atomically(path, save(columns))

    @classmethod
    def load(cls, path: Path) -> TokenDataset:
        """Read what `save` wrote."""
        from safetensors.numpy import load_file

        return cls(**load_file(path))
