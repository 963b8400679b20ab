"""Merge operators: each takes the same tensor of several adapters and their weights, and gives one tensor.

An operator is one function `(tensors, weights, settings) -> tensor`; `OPERATORS` names them. Magnitude pruning and TIES
follow Yadav et al. 2023 (arXiv 2306.01708), DARE Yu et al. 2023 (2311.03099).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

SignMethod = Literal["total", "frequency"]


@dataclass(frozen=True)
class Settings:
    """What the pruning operators need to know.

    Attributes:
        density: share of values kept, one for each tensor.
        majority_sign_method: `total` weighs signs by magnitude, `frequency` counts them.
        generator: randomness of DARE; None uses torch's global one.
    """

    density: Sequence[float] = ()
    majority_sign_method: SignMethod = "total"
    generator: Generator | None = None


Operator = Callable[[Sequence["Tensor"], Sequence[float], Settings], "Tensor"]


def linear(tensors: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """Sum of w_i t_i."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor
    return total


def magnitude_prune(tensors: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """Sum of w_i t_i after keeping the largest values of each."""
    return linear(_largest_of_each(tensors, settings), weights, settings)


def ties(tensors: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """Keep the largest values, elect a sign for each place, average the values that agree with it."""
    return disjoint_merge(_largest_of_each(tensors, settings), weights, settings)


def dare_linear(tensors: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """Sum of w_i t_i after dropping values at random and scaling up the rest."""
    return linear(_random_of_each(tensors, settings), weights, settings)


def dare_ties(tensors: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
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


def disjoint_merge(tensors: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """Sum of w_i t_i over the values that have the majority's sign, divided by how many they are."""
    majority = majority_sign(tensors, settings.majority_sign_method)
    total, count = torch.zeros_like(tensors[0]), torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = tensor.sign() == majority
        total += torch.where(agrees, weight * tensor, 0)
        count += agrees
    return total / count.clamp_min(1)


def majority_sign(tensors: Sequence[Tensor], method: SignMethod = "total") -> Tensor:
    """The sign elected at each place, +1 or -1; a draw is +1."""
    if method not in ("total", "frequency"):
        raise InputError(
            f'Unimplemented mask method "{method}"', field="majority_sign_method", allowed="total, frequency"
        )
    votes = torch.zeros_like(tensors[0])
    for tensor in tensors:
        votes += tensor if method == "total" else tensor.sign()
    return torch.where(votes >= 0, 1.0, -1.0).to(votes.dtype)


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """The int(density * n) values of largest magnitude; the others zero."""
    count = int(checked_density(density) * tensor.numel())
    if count >= tensor.numel():
        return tensor
    if count == 0:
        return torch.zeros_like(tensor)
    magnitude = tensor.abs().flatten()
    # The k-th largest is found without sorting; at a draw the first ones in order are kept, so the count is exact.
    threshold = magnitude.kthvalue(magnitude.numel() - count + 1).values
    above = magnitude > threshold
    level = magnitude == threshold
    keep = above | (level & (level.cumsum(0) <= count - above.sum()))
    return torch.where(keep.view_as(tensor), tensor, 0)


def keep_random(tensor: Tensor, density: float, generator: Generator | None = None) -> Tensor:
    """Each value kept with probability `density` and scaled by 1 / density, so that the expectation stays."""
    if checked_density(density) >= 1:
        return tensor
    if density == 0:
        return torch.zeros_like(tensor)
    chance = torch.rand(tensor.shape, generator=generator, dtype=torch.float32)
    return torch.where((chance < density).to(tensor.device), tensor / density, 0)


def checked_density(density: float) -> float:
    if not 0 <= density <= 1:
        raise InputError(f"Density should be >= 0 and <= 1, got {density}", field="density")
    return density


def _largest_of_each(tensors: Sequence[Tensor], settings: Settings) -> list[Tensor]:
    return [keep_largest(tensor, density) for tensor, density in zip(tensors, settings.density, strict=True)]


def _random_of_each(tensors: Sequence[Tensor], settings: Settings) -> list[Tensor]:
    return [
        keep_random(tensor, density, settings.generator)
        for tensor, density in zip(tensors, settings.density, strict=True)
    ]
