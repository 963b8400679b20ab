"""Samples padded to one rectangular batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from peftcli.data.tokens import Sample

IGNORED = -100
"""The label that torch's cross-entropy leaves out."""

MULTIPLE = 8
"""Rows are padded to a multiple of this: what matrix units take at once."""


def collate(samples: Sequence[Sample], pad_token_id: int, multiple_of: int = MULTIPLE) -> dict[str, NDArray[np.int64]]:
    """Pad on the right to the longest sample, rounded up to a multiple.

    What is padding is told by position, never by id: a tokenizer whose pad is its eos keeps its eos labels.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each [B, T] int64; `labels[b, t]` is the token the model should have
        predicted before t, or `IGNORED`.
    """
    longest = max(len(ids) for ids, _ in samples)
    shape = (len(samples), -(-longest // multiple_of) * multiple_of)
    batch = {
        "input_ids": np.full(shape, pad_token_id, np.int64),
        "attention_mask": np.zeros(shape, np.int64),
        "labels": np.full(shape, IGNORED, np.int64),
    }
    for row, (ids, supervised) in enumerate(samples):
        batch["input_ids"][row, : len(ids)] = ids
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, : len(ids)] = np.where(supervised, ids, IGNORED)
    return batch
