"""What the loop is fed with: the optimizer steps of a data set held whole, or of a stream, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable

from peftcli.data.stream import Stream
from peftcli.data.tokens import TokenDataset
from peftcli.errors import InputError
from peftcli.training.batches import Window
from peftcli.training.state import Progress

MakeWindows = Callable[[TokenDataset, int], list[Window]]
"""The optimizer steps of some samples on this process; the number seeds their order."""


class Feed:
    """A data set held whole: an epoch is all of it.

    Args:
        data: its samples.
        make_windows: makes steps of samples.

    Attributes:
        data: what the indices of the running windows are of.
        units, lengths: [samples] of each sample of it, what the loss is a mean over, and its tokens.
        steps_per_epoch: None where it isn't known.
    """

    def __init__(self, data: TokenDataset, make_windows: MakeWindows) -> None:
        self._make_windows = make_windows
        self._take(data)
        self.steps_per_epoch = self._count_steps()

    def _count_steps(self) -> int | None:
        return len(self._make_windows(self.data, 0))

    def windows(self, progress: Progress) -> list[Window]:
        """The steps of the running epoch, or chunk of it, on this process."""
        return self._make_windows(self.data, progress.epoch)

    def advance(self, progress: Progress) -> None:
        """Note that a step was done."""
        progress.window += 1
        if progress.window == self.steps_per_epoch:
            progress.epoch, progress.window = progress.epoch + 1, 0

    def epoch(self, progress: Progress) -> float:
        """Epochs done, the running one in part where its length is known."""
        return round(progress.epoch + progress.window / (self.steps_per_epoch or 1), 4)

    def _take(self, data: TokenDataset) -> None:
        self.data, self.units, self.lengths = data, data.units, data.lengths


class StreamFeed(Feed):
    """A stream: an epoch is chunk after chunk, and after the last one the next epoch begins.

    Args:
        stream: gives the chunks.
        say: is told when the data begin again.
        data: its first samples.
        make_windows: makes steps of the samples of a chunk.
    """

    def __init__(
        self, stream: Stream, say: Callable[[str], None], data: TokenDataset, make_windows: MakeWindows
    ) -> None:
        super().__init__(data, make_windows)
        self._stream, self._say = stream, say
        self._there: tuple[int, int] | None = None
        self._windows: list[Window] = []
        self._is_last = False

    def _count_steps(self) -> int | None:
        return None

    def windows(self, progress: Progress) -> list[Window]:
        began = progress.epoch
        while progress.epoch <= began + 1:
            self._open(progress)
            if self._windows:
                return self._windows
            self._move_on(progress)  # no sample of the chunk was kept
        raise InputError("no row of the stream leaves a token to learn", field="data.train")

    def advance(self, progress: Progress) -> None:
        progress.window += 1
        if progress.window == len(self._windows):
            self._move_on(progress)

    def epoch(self, progress: Progress) -> float:
        return float(progress.epoch)

    def _open(self, progress: Progress) -> None:
        if self._there == (progress.epoch, progress.chunk):
            return
        self._there = progress.epoch, progress.chunk
        data, self._is_last = self._stream.chunk(progress.epoch, progress.chunk)
        self._take(data)
        self._windows = self._make_windows(data, progress.epoch << 32 | progress.chunk) if len(data) else []

    def _move_on(self, progress: Progress) -> None:
        progress.chunk, progress.window = progress.chunk + 1, 0
        if self._is_last:
            progress.epoch, progress.chunk = progress.epoch + 1, 0
            self._say(f"the data have ended after step {progress.step}: they begin again")
