"""LoftQ: a quantised weight and a LoRA start that together are close to the original (Li et al. 2023, 2310.08659).

The base weight becomes q, the dequantised block-wise quantisation, and s B A makes up for what was lost:
repeat q = quantise(W - s B A); B A = best rank-r approximation of (W - q) / s.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from peftcli.adapters.initializers import require_rank
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_SIZE = 64
OFFSET = 0.9677083  # largest quantile of the NormalFloat map (QLoRA, 2305.14314, appendix E)


def loftq(weight: Tensor, r: int, scaling: float, bits: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """(q [out, in], A [r, in], B [out, r]) in float32.

    Args:
        weight: [out, in].
        r: rank.
        scaling: LoRA's s.
        bits: 2, 4 or 8.
        iterations: alternations; at least 1.

    Raises:
        InputError: for a rank larger than the weight's.
    """
    require_rank("loftq", r, weight)
    weight = weight.float()
    residual = weight
    for _ in range(iterations):
        quantized = quantize_dequantize(residual, bits)
        u, s, vh = torch.linalg.svd(weight - quantized, full_matrices=False)
        root = (s[:r] / scaling).sqrt()
        a, b = root[:, None] * vh[:r], u[:, :r] * root
        residual = weight - scaling * b @ a
    return quantized, a, b


def quantize_dequantize(weight: Tensor, bits: int) -> Tensor:
    """The weight rounded to NormalFloat levels in blocks of 64 values, each block scaled by its largest magnitude."""
    flat = weight.flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    largest = padded.abs().amax(1, keepdim=True).clamp_min(torch.finfo(padded.dtype).tiny)
    levels = normal_float_levels(bits).to(padded)
    middles = (levels[1:] + levels[:-1]) / 2
    rounded = levels[torch.bucketize(padded / largest, middles)] * largest
    return rounded.flatten()[: flat.numel()].view_as(weight)


def normal_float_levels(bits: int) -> Tensor:
    """The 2^bits levels of NormalFloat in [-1, 1], ascending: quantiles of N(0, 1), with an exact zero."""
    half = 2 ** (bits - 1)

    def quantiles(count: int) -> Tensor:
        probabilities = torch.linspace(OFFSET, 0.5, count, dtype=torch.float64)[:-1]
        return math.sqrt(2) * torch.erfinv(2 * probabilities - 1)

    levels = torch.cat([quantiles(half + 1), torch.zeros(1, dtype=torch.float64), -quantiles(half)]).sort().values
    return (levels / levels.max()).float()
