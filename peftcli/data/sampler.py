"""Which samples go together in a batch, in which order, on which rank."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftcli.errors import InputError
from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

WINDOWS_PER_CHUNK = 50
"""Samples are sorted by length within chunks of this many windows: long enough to leave little padding (1-2 %), short
enough that a sample's neighbours differ from epoch to epoch."""


def batches(
    lengths: Sequence[int] | NDArray[np.int64],
    batch_size: int,
    seed: int,
    epoch: int,
    group_by_length: bool = True,
    world_size: int = 1,
    rank: int = 0,
    drop_last: bool = False,
    row_length: int | None = None,
) -> list[list[int]]:
    """The batches of sample indices that `rank` sees in `epoch`; the same call gives the same answer everywhere.

    The shuffled samples are cut into windows of `batch_size * world_size`, one batch for each rank, so that every sample
    is seen exactly once an epoch and all ranks take the same number of steps. The last, short window is shared out
    evenly; with fewer samples than ranks some get an empty batch, with which they only keep step.

    With `group_by_length` a window holds samples of similar length, windows come in random order and the one with the
    longest sample comes first, so that a batch that does not fit in memory fails at the first step.

    With `row_length` a batch is `batch_size` rows of up to so many tokens, each filled with whole samples.

    Raises:
        InputError: `drop_last` leaves nothing.
    """
    if not 0 <= rank < world_size or batch_size < 1:
        raise ValueError(f"rank {rank} of {world_size} with batches of {batch_size}")
    generator = np.random.default_rng([seed, epoch])
    sizes = np.asarray(lengths)
    order = generator.permutation(len(sizes))
    size = batch_size * world_size
    if row_length is not None:
        rows = packed(order, sizes, row_length)
        places = generator.permutation(len(rows))
        windows = [places[start : start + size] for start in range(0, len(rows), size)]
        return [[index for place in window[rank::world_size] for index in rows[place]] for window in windows]
    if group_by_length:
        order = _sorted_in_chunks(order, sizes, size * WINDOWS_PER_CHUNK)
    windows = [order[start : start + size] for start in range(0, len(order), size)]
    if drop_last:
        windows = _drop(windows, size)
    if group_by_length:
        windows = _shuffled(windows, sizes, generator)
    return [window[rank::world_size].tolist() for window in windows]


def packed(order: NDArray[np.int64], lengths: NDArray[np.int64], row_length: int) -> list[list[int]]:
    """The samples of `order` in rows of at most `row_length` tokens: the longest first, each into the fullest row it fits.

    How many rows there are depends on the lengths alone; which of several equally long samples goes where, on `order`.
    (Best-fit decreasing; for packing in training: Ding et al. 2024, arXiv 2404.10830.)
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows by the tokens they have left
    rooms: list[int] = []  # the keys of by_room, rising
    for index in order[np.argsort(-lengths[order], kind="stable")].tolist():
        length = int(lengths[index])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            rows.append([])
            row, room = len(rows) - 1, row_length
        else:
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        rows[row].append(index)
        left = room - length
        if left > 0:
            if left not in by_room:
                insort(rooms, left)
            by_room.setdefault(left, []).append(row)
    return rows


def _sorted_in_chunks(order: NDArray[np.int64], lengths: NDArray[np.int64], chunk: int) -> NDArray[np.int64]:
    """`order` with each run of `chunk` samples sorted by falling length (equal lengths keep their random order)."""
    parts = [order[start : start + chunk] for start in range(0, len(order), chunk)]
    return np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts] or [order])


def _drop(windows: list[NDArray[np.int64]], size: int) -> list[NDArray[np.int64]]:
    full = [window for window in windows if len(window) == size]
    if windows and not full:
        raise InputError(
            f"{len(windows[0])} samples do not fill one batch of {size} (all processes), and short batches are dropped",
            field="training.dataloader_drop_last",
            fix="lower training.per_device_train_batch_size, or keep the short batch",
        )
    return full


def _shuffled(
    windows: list[NDArray[np.int64]], lengths: NDArray[np.int64], generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """`windows` in random order: that with the longest sample first, the last (perhaps short) one last."""
    if len(windows) < 2:
        return windows
    *full, last = windows
    shuffled = [full[index] for index in generator.permutation(len(full))]
    longest = max(range(len(shuffled)), key=lambda index: lengths[shuffled[index]].max())
    shuffled[0], shuffled[longest] = shuffled[longest], shuffled[0]
    return [*shuffled, last]
