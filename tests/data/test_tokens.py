"""The flat columns, and the rectangular batch made from them."""

from __future__ import annotations

import numpy as np
import pytest

from peftcli.data.collate import IGNORED, collate
from peftcli.data.tokens import TokenDataset

SAMPLES = [([1, 2, 3], [False, False, True]), ([4], [False]), ([], []), ([5, 2], [False, True])]


@pytest.fixture
def dataset() -> TokenDataset:
    return TokenDataset.from_samples((np.array(ids, np.int32), np.array(mask, bool)) for ids, mask in SAMPLES)


def plain(dataset):
    return [(ids.tolist(), mask.tolist()) for ids, mask in (dataset[index] for index in range(len(dataset)))]


def test_samples_come_back(dataset, tmp_path):
    assert plain(dataset) == SAMPLES
    dataset.save(tmp_path / "train.safetensors")
    again = TokenDataset.load(tmp_path / "train.safetensors")
    assert plain(again) == SAMPLES
    assert [file.name for file in tmp_path.iterdir()] == ["train.safetensors"]
    assert (again.input_ids.dtype, again.supervised.dtype, again.offsets.dtype) == (np.int32, np.bool_, np.int64)


def test_counts(dataset):
    assert dataset.lengths.tolist() == [3, 1, 0, 2]
    assert dataset.label_counts.tolist() == [1, 0, 0, 1]


def test_select_repeats_and_reorders(dataset):
    assert plain(dataset.select([3, 0, 3])) == [SAMPLES[3], SAMPLES[0], SAMPLES[3]]
    assert len(dataset.select([])) == 0


def test_an_index_out_of_range_is_refused(dataset):
    with pytest.raises(IndexError):
        dataset[4]


def test_collate_marks_padding_by_position_not_by_id(dataset):
    batch = collate([dataset[0], dataset[3]], pad_token_id=2, multiple_of=1)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 3], [IGNORED, 2, IGNORED]]


def test_collate_rounds_up(dataset):
    assert collate([dataset[0]], 0)["input_ids"].shape == (1, 8)
