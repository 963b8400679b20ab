"""Samples of any task to rectangular batches. What a data set's columns hold decides what a batch holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftcli.data.collate import collate
from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from peftcli.data.tokens import TokenDataset


def collate_task(dataset: TokenDataset, indices: Sequence[int], pad_token_id: int) -> dict[str, NDArray[np.int64]]:
    """The samples at `indices`, padded on the right.

    Returns:
        `input_ids`, `attention_mask`, `labels` [B, T] as `collate` makes them; `labels` holds the classes of tokens where
        these have some; with two sequences a sample the second's as `second_input_ids`, ... [B, S];
        `token_type_ids` [B, T] with segments; `targets` [B, K].
    """
    samples = [dataset[index] for index in indices]
    if dataset.second is None:
        batch = collate(samples, pad_token_id)
    else:
        borders = dataset.second[list(indices)]
        halves = [
            [(ids[part], learnt[part]) for (ids, learnt), part in zip(samples, parts, strict=True)]
            for parts in ([slice(0, border) for border in borders], [slice(border, None) for border in borders])
        ]
        batch, second = (collate(half, pad_token_id) for half in halves)
        batch |= {f"second_{name}": array for name, array in second.items()}
    if dataset.tags is not None:
        spans = [slice(dataset.offsets[index], dataset.offsets[index + 1]) for index in indices]
        tagged = [(dataset.tags[span], learnt) for span, (_, learnt) in zip(spans, samples, strict=True)]
        batch["labels"] = collate(tagged, pad_token_id)["labels"]
    if dataset.segment is not None:
        positions = np.arange(batch["input_ids"].shape[1])
        begins = np.where(dataset.segment[list(indices)] > 0, dataset.segment[list(indices)], len(positions))
        batch["token_type_ids"] = (positions >= begins[:, None]) * batch["attention_mask"]
    if dataset.targets is not None:
        batch["targets"] = dataset.targets[list(indices)]
    return batch
