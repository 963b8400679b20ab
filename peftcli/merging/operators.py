"""Merge operators: each takes the same tensor of several adapters and their weights, and gives one tensor.

An operator is one function `(tensors, weights, settings) -> tensor`; `OPERATORS` names them. Tensors are numpy's (files) or
torch's (live models): what is used is what both have. Magnitude pruning and TIES follow Yadav et al. 2023 (arXiv
2306.01708), DARE Yu et al. 2023 (2311.03099).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftcli.errors import InputError
from peftcli.lazy import numpy, torch

Array = Any
"""A numpy array or a torch tensor."""

SignMethod = Literal["total", "frequency"]

BLOCK = 1 << 15
"""Elements of a tensor that are merged at once where that is quicker."""


@dataclass(frozen=True)
class Settings:
    """What the pruning operators need to know.

    Attributes:
        density: share of values kept, one for each tensor.
        majority_sign_method: `total` weighs signs by magnitude, `frequency` counts them.
        generator: randomness of DARE, of the tensors' library; None uses torch's global one.
    """

    density: Sequence[float] = ()
    majority_sign_method: SignMethod = "total"
    generator: Any = None


Operator = Callable[[Sequence[Array], Sequence[float], Settings], Array]


def namespace(tensor: Array) -> Any:
    """The library a tensor is of."""
    return numpy if type(tensor).__module__ == "numpy" else torch


def linear(tensors: Sequence[Array], weights: Sequence[float], settings: Settings) -> Array:
    """Sum of w_i t_i."""
    total = weights[0] * tensors[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += weight * tensor
    return total


def magnitude_prune(tensors: Sequence[Array], weights: Sequence[float], settings: Settings) -> Array:
    """Sum of w_i t_i after keeping the largest values of each."""
    return linear(_largest_of_each(tensors, settings), weights, settings)


def ties(tensors: Sequence[Array], weights: Sequence[float], settings: Settings) -> Array:
    """Keep the largest values, elect a sign for each place, average the values that agree with it."""
    return disjoint_merge(_largest_of_each(tensors, settings), weights, settings)


def dare_linear(tensors: Sequence[Array], weights: Sequence[float], settings: Settings) -> Array:
    """Sum of w_i t_i after dropping values at random and scaling up the rest."""
    return linear(_random_of_each(tensors, settings), weights, settings)


def dare_ties(tensors: Sequence[Array], weights: Sequence[float], settings: Settings) -> Array:
    """TIES' election and average on randomly pruned values."""
    return disjoint_merge(_random_of_each(tensors, settings), weights, settings)


OPERATORS: dict[str, Operator] = {
    "linear": linear,
    "magnitude_prune": magnitude_prune,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
}


SVD_TYPES = {
    "svd": "linear",
    "ties_svd": "ties",
    "dare_linear_svd": "dare_linear",
    "dare_ties_svd": "dare_ties",
    "magnitude_prune_svd": "magnitude_prune",
}
"""PEFT's types that merge whole updates, and the operator each applies to them."""

COMBINATION_TYPES = [*OPERATORS, "cat", *SVD_TYPES]


def disjoint_merge(tensors: Sequence[Array], weights: Sequence[float], settings: Settings) -> Array:
    """Sum of w_i t_i over the values that have the majority's sign, divided by how many they are.

    Rows are taken a few at a time: what fits into the processor's cache is several times as fast.
    """
    merged = namespace(tensors[0]).zeros_like(tensors[0])
    rows = len(merged) * BLOCK // max(math.prod(merged.shape), 1) or 1
    for start in range(0, len(merged), rows):
        block = [tensor[start : start + rows] for tensor in tensors]
        majority = majority_sign(block, settings.majority_sign_method)
        total = merged[start : start + rows]
        count = total + 0
        for tensor, weight in zip(block, weights, strict=True):
            agrees = tensor * majority > 0
            total += weight * tensor * agrees  # masks multiply: `where` costs numpy twenty times as much
            count += agrees
        count += count == 0
        total /= count
    return merged


def majority_sign(tensors: Sequence[Array], method: SignMethod = "total") -> Array:
    """The sign elected at each place, +1 or -1; a draw is +1."""
    if method not in ("total", "frequency"):
        raise InputError(
            f'Unimplemented mask method "{method}"', field="majority_sign_method", allowed="total, frequency"
        )
    xp = namespace(tensors[0])
    votes = xp.zeros_like(tensors[0])
    for tensor in tensors:
        votes += tensor if method == "total" else xp.sign(tensor)
    sign = xp.sign(votes)
    sign += sign == 0
    return sign


def keep_largest(tensor: Array, density: float) -> Array:
    """The int(density * n) values of largest magnitude; the others zero."""
    size = math.prod(tensor.shape)
    count = int(checked_density(density) * size)
    if count >= size:
        return tensor
    xp = namespace(tensor)
    if count == 0:
        return xp.zeros_like(tensor)
    magnitude = xp.abs(tensor).reshape(-1)
    # The k-th largest is found without sorting; at a draw the first ones in order are kept, so the count is exact.
    threshold = _kth_smallest(magnitude, size - count)
    keep = magnitude >= threshold
    surplus = int(xp.count_nonzero(keep)) - count
    if surplus:
        level = (magnitude == threshold).nonzero()
        keep[(level[0] if xp is numpy else level.reshape(-1))[-surplus:]] = False
    return tensor * keep.reshape(tensor.shape)


def _kth_smallest(flat: Array, place: int) -> Array:
    """The value at a place of the sorted tensor, counted from 0."""
    return numpy.partition(flat, place)[place] if namespace(flat) is numpy else flat.kthvalue(place + 1).values


def keep_random(tensor: Array, density: float, generator: Any = None) -> Array:
    """Each value kept with probability `density` and scaled by 1 / density, so that the expectation stays."""
    if checked_density(density) >= 1:
        return tensor
    xp = namespace(tensor)
    if density == 0:
        return xp.zeros_like(tensor)
    if xp is numpy:
        chance = generator.random(tensor.shape, dtype="f4")
    else:
        chance = torch.rand(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.device)
    return tensor / density * (chance < density)


def checked_density(density: float) -> float:
    if not 0 <= density <= 1:
        raise InputError(f"Density should be >= 0 and <= 1, got {density}", field="density")
    return density


def _largest_of_each(tensors: Sequence[Array], settings: Settings) -> list[Array]:
    return [keep_largest(tensor, density) for tensor, density in zip(tensors, settings.density, strict=True)]


def _random_of_each(tensors: Sequence[Array], settings: Settings) -> list[Array]:
    return [
        keep_random(tensor, density, settings.generator)
        for tensor, density in zip(tensors, settings.density, strict=True)
    ]
