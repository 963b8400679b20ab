"""Causal attention over short samples as plain matrix products, in bfloat16 on CPUs.

torch's flash kernel has a slow backward pass there. Measured (AMX, 9 heads of 64, 3 of keys), forward and backward over
64 tokens take 3.4 x as long as written out, over 128 tokens 4.0 x, over 256 tokens 1.6 x. Errors against float64 are equal.
The price are the weights [H, T, T], kept for the backward pass: above the limit they would outgrow the rest.
"""

from __future__ import annotations

from typing import Any

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253

LONGEST = 256
"""Tokens up to which samples are attended to this way."""


def is_short(query: Tensor, dropout: float) -> bool:
    """Whether to attend this way: a gradient is wanted, in bfloat16, on a CPU, over few tokens."""
    grad = torch.is_grad_enabled() and query.requires_grad
    return (
        grad
        and not dropout
        and query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and query.shape[2] <= LONGEST
    )


class ShortAttention(torch.autograd.Function):
    """softmax(scale q k^T) v, causal: q [1, H, T, D], k and v [1, Hk, T, D] -> [1, T, H, D].

    Heads that share a key (H > Hk) are stacked along the tokens, so that every product is one of Hk matrices.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        heads, length, width = q.shape[1:]
        queries, k, v = _stacked(q, k.shape[1]), k[0], v[0]
        future = torch.full((length, length), float("-inf"), dtype=q.dtype).triu_(1).repeat(heads // len(k), 1)
        weights = torch.baddbmm(future, queries, k.mT, alpha=scale).softmax(-1)
        ctx.save_for_backward(queries, k, v, weights)
        ctx.scale, ctx.heads = scale, heads
        return (weights @ v).view(1, heads, length, width).transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, k, v, weights = ctx.saved_tensors
        upper = _stacked(gradients[0].transpose(1, 2), k.shape[0])
        by_value = weights.mT @ upper
        slope = torch.ops.aten._softmax_backward_data(upper @ v.mT, weights, -1, weights.dtype).mul_(ctx.scale)
        by_query = (slope @ k).view(1, ctx.heads, k.shape[1], -1)
        return by_query, (slope.mT @ queries).unsqueeze(0), by_value.unsqueeze(0), None


def _stacked(x: Tensor, groups: int) -> Tensor:
    """[1, H, T, D] -> [groups, H / groups * T, D]."""
    return x.reshape(groups, -1, x.shape[-1])
