"""What the loop is fed with: the optimizer steps of a data set held whole, or of a stream, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable

from peftcli.data.stream import Stream
from peftcli.data.tokens import TokenDataset
from peftcli.errors import InputError
from peftcli.recipe.training_section import TrainingSection
from peftcli.training.batches import Window, training_windows
from peftcli.training.state import Progress


class Feed:
    """A data set held whole: an epoch is all of it.

    Args:
        data: its samples.
        settings: the recipe's `training` section.
        world_size, rank: the processes, and which of them this is.
        row_length: see `training_windows`.

    Attributes:
        data: what the indices of the running windows are of.
        units, lengths: [samples] of each sample of it, what the loss is a mean over, and its tokens.
        steps_per_epoch: None where it isn't known.
    """

    steps_per_epoch: int | None

    def __init__(
        self,
        data: TokenDataset,
        settings: TrainingSection,
        *,
        world_size: int = 1,
        rank: int = 0,
        row_length: int | None = None,
    ) -> None:
        self._settings, self._world_size, self._rank, self._row_length = settings, world_size, rank, row_length
        self._take(data)
        self.steps_per_epoch = len(self._windows_of(0))

    def windows(self, progress: Progress) -> list[Window]:
        """The steps of the running epoch, or chunk of it, on this process."""
        return self._windows_of(progress.epoch)

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

    def _windows_of(self, order: int) -> list[Window]:
        """`order` seeds the shuffling."""
        return training_windows(
            self.data,
            self._settings,
            order,
            world_size=self._world_size,
            rank=self._rank,
            row_length=self._row_length,
        )


class StreamFeed(Feed):
    """A stream: an epoch is chunk after chunk, and after the last one the next epoch begins.

    Args:
        stream: gives the chunks.
        say: is told when the data begin again.
        data: its first samples.
        settings, world_size, rank, row_length: as for `Feed`.
    """

    def __init__(
        self,
        stream: Stream,
        say: Callable[[str], None],
        data: TokenDataset,
        settings: TrainingSection,
        *,
        world_size: int = 1,
        rank: int = 0,
        row_length: int | None = None,
    ) -> None:
        super().__init__(data, settings, world_size=world_size, rank=rank, row_length=row_length)
        self.steps_per_epoch = None
        self._stream, self._say = stream, say
        self._there: tuple[int, int] | None = None
        self._windows: list[Window] = []
        self._is_last = False

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
        self._windows = self._windows_of(progress.epoch << 32 | progress.chunk) if len(data) else []

    def _move_on(self, progress: Progress) -> None:
        progress.chunk, progress.window = progress.chunk + 1, 0
        if self._is_last:
            progress.epoch, progress.chunk = progress.epoch + 1, 0
            self._say(f"the data have ended after step {progress.step}: they begin again")
