"""Orthogonal matrices from free parameters, and block-diagonal ones applied to vectors (OFT, BOFT).

A skew-symmetric S (S^T = -S) gives the rotation R = (I - S)(I + S)^-1, Cayley's transform. S = 0 gives the identity.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def unpack_skew(packed: Tensor, size: int) -> Tensor:
    """Skew-symmetric [..., size, size] from the entries above the diagonal [..., size (size - 1) / 2], row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=packed.device)
    upper = packed.new_zeros(*packed.shape[:-1], size, size)
    upper[..., rows, columns] = packed
    return upper - upper.mT


def cayley(skew: Tensor) -> Tensor:
    """(I - S)(I + S)^-1 of each S [..., n, n], solved in fp32 at least."""
    precise = skew.to(torch.promote_types(skew.dtype, torch.float32))
    identity = torch.eye(skew.shape[-1], dtype=precise.dtype, device=skew.device)
    return torch.linalg.solve(identity + precise, identity - precise, left=False).to(skew.dtype)


def cayley_neumann(skew: Tensor, terms: int, *, last_is_halved: bool = True) -> Tensor:
    """(I + S)(I - S)^-1 with the inverse as a power series, I + 2 S + 2 S^2 + ...: a rotation if S is small.

    That is Cayley's transform of -S, or its transpose: PEFT's two parametrisations turn in opposite directions.

    Args:
        skew: S, [..., n, n].
        terms: how many powers, the zeroth included. PEFT 0.18 and later round 3 up to 4.
        last_is_halved: the last power counts once, as since PEFT 0.18; before, twice like the others.
    """
    highest = max(terms - 1, 3) if last_is_halved and terms > 2 else terms - 1
    rotation = power = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    for exponent in range(1, highest + 1):
        power = power @ skew if exponent > 1 else skew
        rotation = rotation + (power if last_is_halved and exponent == highest > 1 else 2 * power)
    return rotation


def within_ball(blocks: Tensor, radius: float) -> Tensor:
    """Each block [count, n, n] scaled down to a Frobenius norm of at most radius / sqrt(count) (constrained OFT).

    Gradients pass the projection by, as in PEFT, which projects the parameters themselves before each pass.
    """
    radius /= math.sqrt(blocks.shape[0])
    fixed = blocks.detach()
    norm = fixed.flatten(1).norm(dim=1)[:, None, None]
    return blocks + (fixed * (radius / norm.clamp_min(radius)) - fixed)


def rotate_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x [..., count * n] times the block-diagonal matrix of `blocks` [count, n, n]; a single block serves all."""
    parts = x.unflatten(-1, (-1, blocks.shape[-1]))
    return torch.einsum("...ci,cij->...cj", parts, blocks.to(x.dtype)).flatten(-2)


def chosen_blocks(count: int, share: float, device: torch.device) -> Tensor:
    """A mask [count] that is True for int(share * count) blocks chosen at random."""
    return torch.randperm(count, device=device) < int(share * count)
