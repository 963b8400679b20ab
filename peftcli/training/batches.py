"""From a tokenised data set to the batches of one process."""

from __future__ import annotations

import numpy as np  # noqa: TID253
import torch  # noqa: TID253
from numpy.typing import ArrayLike  # noqa: TID253
from torch import Tensor  # noqa: TID253

from peftcli.data.collate import IGNORED
from peftcli.data.sampler import batches
from peftcli.data.task_collate import collate_task
from peftcli.data.tokens import TokenDataset
from peftcli.recipe.schema import Recipe
from peftcli.recipe.training_section import TrainingSection

Window = list[list[int]]
"""Sample indices of the batches of one optimizer step."""


def row_length(recipe: Recipe) -> int | None:
    """Tokens of the rows that samples are packed into; None where each has a row of its own."""
    return recipe.data.max_length if recipe.data.packing == "bfd" else None


def training_windows(
    dataset: TokenDataset,
    settings: TrainingSection,
    epoch: int,
    *,
    world_size: int = 1,
    rank: int = 0,
    row_length: int | None = None,
) -> list[Window]:
    """The optimizer steps of one epoch on one process; the last may hold fewer batches.

    With `row_length` samples are packed: a batch is so many rows of that many tokens, not so many samples.
    """
    order = batches(
        dataset.lengths,
        settings.per_device_train_batch_size,
        settings.seed if settings.data_seed is None else settings.data_seed,
        epoch,
        group_by_length=settings.group_by_length,
        world_size=world_size,
        rank=rank,
        row_length=row_length,
    )
    size = settings.gradient_accumulation_steps
    return [order[start : start + size] for start in range(0, len(order), size)]


def evaluation_batches(lengths: ArrayLike, size: int, *, world_size: int = 1, rank: int = 0) -> list[list[int]]:
    """Every sample once over all processes, longest first; processes with fewer batches get empty ones at the end."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    groups: list[list[int]] = [order[start : start + size] for start in range(0, len(order), size)]
    groups += [[]] * (-len(groups) % world_size)
    return groups[rank::world_size]


def to_batch(dataset: TokenDataset, indices: list[int], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """What `collate_task` makes of the samples, and `task_ids` [B] where there are several tasks, on the device.

    An empty list gives a batch without labels, so that this process can keep step with the others.
    """
    arrays = collate_task(dataset, indices or [0], pad_token_id)
    if not indices:
        for name in {"labels", "second_labels", "targets"} & set(arrays):
            arrays[name].fill(IGNORED)
    if dataset.tasks is not None:
        arrays["task_ids"] = dataset.tasks[indices or [0]]
    return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}
