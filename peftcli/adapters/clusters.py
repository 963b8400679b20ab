"""k-means as scikit-learn runs it from a random start, so that groups no file holds come out as they did in PEFT.

Points exactly as near to two centres may fall differently: there the rounding of a library's matrix product decides.
"""

from __future__ import annotations

import numpy as np  # noqa: TID253
import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253


def k_means(points: Tensor, count: int, *, steps: int, seed: int) -> Tensor:
    """The group [n] of each row of `points` [n, d] after Lloyd's algorithm (float32, on the CPU).

    Args:
        count: how many groups, at most n.
        steps: how often centres move at most.
        seed: of numpy's generator, which draws the rows that are the first centres.
    """
    x = np.ascontiguousarray(points.detach().cpu().float())  # sums round by the order in memory
    weights = np.ones(len(x), dtype=np.float32)
    first = np.random.RandomState(seed).choice(len(x), size=count, replace=False, p=weights / weights.sum())
    tolerance = 1e-4 * x.var(axis=0).mean()
    x = x - x.mean(axis=0)
    centres, labels = x[first], None
    for _ in range(steps):
        nearest = _nearest(x, centres)
        before, centres = centres, _moved(x, centres, nearest)
        if labels is not None and np.array_equal(nearest, labels):
            return torch.from_numpy(nearest)
        labels = nearest
        if ((centres - before) ** 2).sum() <= tolerance:
            break
    return torch.from_numpy(_nearest(x, centres))


def _nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The nearest centre [n]: |x - c|^2 without its part |x|^2."""
    return ((centres**2).sum(axis=1) - 2 * x @ centres.T).argmin(axis=1)


def _moved(x: np.ndarray, centres: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean of each group; a group that lost all its points takes the one farthest from its centre."""
    labels = labels.copy()
    empty = np.flatnonzero(np.bincount(labels, minlength=len(centres)) == 0)
    if len(empty):
        distances = ((x - centres[labels]) ** 2).sum(axis=1)
        labels[np.argpartition(distances, -len(empty))[: -len(empty) - 1 : -1]] = empty
    sums = [x[labels == group].sum(axis=0) for group in range(len(centres))]
    return np.stack([total * np.float32(1 / size) for total, size in zip(sums, np.bincount(labels), strict=True)])
