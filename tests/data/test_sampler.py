"""Every sample once an epoch, the same number of steps on every rank, the same answer every time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcli.data.sampler import batches, packed
from peftcli.errors import InputError

shapes = {
    "lengths": st.lists(st.integers(1, 50), max_size=120),
    "batch_size": st.integers(1, 5),
    "world_size": st.integers(1, 4),
    "group_by_length": st.booleans(),
    "seed": st.integers(0, 3),
    "epoch": st.integers(0, 2),
}


def all_ranks(lengths, batch_size, world_size, **settings):
    return [batches(lengths, batch_size, world_size=world_size, rank=rank, **settings) for rank in range(world_size)]


@given(**shapes)
@settings(max_examples=300, deadline=None)
def test_every_sample_is_seen_once_in_equally_many_batches(lengths, batch_size, world_size, **settings):
    ranks = all_ranks(lengths, batch_size, world_size, **settings)
    assert len({len(rank) for rank in ranks}) == 1
    assert all(len(batch) <= batch_size for rank in ranks for batch in rank)
    assert all(batch for rank in ranks for batch in rank[:-1])  # only in the last window may one be empty
    assert Counter(index for rank in ranks for batch in rank for index in batch) == Counter(range(len(lengths)))
    for window in zip(*ranks, strict=True):
        sizes = [len(batch) for batch in window]
        assert max(sizes) - min(sizes) <= 1


@given(**shapes)
@settings(max_examples=50, deadline=None)
def test_the_same_call_gives_the_same_batches(**call):
    assert all_ranks(**call) == all_ranks(**call)


@pytest.mark.parametrize("group_by_length", [False, True])
def test_seed_and_epoch_change_the_order(group_by_length):
    lengths = np.arange(1, 200)
    orders = [
        str(batches(lengths, 4, seed, epoch, group_by_length)) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]
    ]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("group_by_length", [False, True])
def test_one_process_and_two_see_the_same_windows(group_by_length):
    lengths = np.random.default_rng(0).integers(1, 100, 101)
    one = batches(lengths, 8, 0, 0, group_by_length)
    first, second = all_ranks(lengths, 4, 2, seed=0, epoch=0, group_by_length=group_by_length)
    assert [sorted(window) for window in one] == [sorted(a + b) for a, b in zip(first, second, strict=True)]


def test_grouping_leaves_little_padding_and_starts_with_the_longest():
    lengths = np.random.default_rng(0).integers(10, 500, 4000)

    def padding(plan):
        return 1 - lengths.sum() / sum(len(batch) * lengths[batch].max() for batch in plan)

    grouped = batches(lengths, 8, 0, 0, group_by_length=True)
    assert padding(grouped) < 0.03
    assert padding(batches(lengths, 8, 0, 0, group_by_length=False)) > 0.3
    assert lengths[grouped[0]].max() == lengths.max()
    widest = [int(lengths[batch].max()) for batch in grouped]
    assert widest != sorted(widest) and widest != sorted(widest, reverse=True)


def test_drop_last():
    assert [len(batch) for batch in batches([5] * 10, 4, 0, 0, drop_last=True)] == [4, 4]
    with pytest.raises(InputError, match="2 samples do not fill one batch of 8"):
        batches([5, 5], 8, 0, 0, drop_last=True)
    assert batches([], 8, 0, 0, drop_last=True) == []


@given(
    lengths=st.lists(st.integers(1, 20), max_size=80),
    batch_size=st.integers(1, 3),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 2),
)
@settings(max_examples=200, deadline=None)
def test_packed_rows(lengths: list[int], batch_size: int, world_size: int, seed: int) -> None:
    """Every sample once; no batch holds more than its rows; as many steps in every epoch and on every rank."""

    def run(epoch: int) -> list[list[list[int]]]:
        return all_ranks(lengths, batch_size, world_size, seed=seed, epoch=epoch, row_length=20)

    ranks = run(0)
    assert Counter(index for rank in ranks for batch in rank for index in batch) == Counter(range(len(lengths)))
    assert all(sum(lengths[index] for index in batch) <= 20 * batch_size for rank in ranks for batch in rank)
    assert len({len(rank) for rank in ranks} | {len(rank) for rank in run(1)}) <= 1
    assert ranks == run(0)


def test_packing_is_tight_and_goes_on_order_among_equals() -> None:
    lengths = np.array([9, 8, 7, 5, 5, 3, 2, 1])
    rows = packed(np.arange(8), lengths, 10)
    assert sorted(sorted(lengths[row].tolist()) for row in rows) == [[1, 9], [2, 8], [3, 7], [5, 5]]
    equal = np.full(6, 5)
    assert packed(np.array([4, 0, 5, 1, 3, 2]), equal, 10) == [[4, 0], [5, 1], [3, 2]]


def test_packing_many_samples_is_quick_enough_to_be_done_each_epoch() -> None:
    """A hundred thousand samples: what is quadratic would be noticed."""
    lengths = np.random.default_rng(0).integers(16, 1024, 100_000)
    rows = packed(np.arange(len(lengths)), lengths, 1024)
    assert lengths.sum() / 1024 / len(rows) > 0.99
