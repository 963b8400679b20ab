"""Causal attention as plain matrix products over blocks of queries, in bfloat16 on CPUs.

torch's flash kernel is slow there. Measured (AMX, 9 heads of 64, 3 of keys), forward and backward take it 2.0 x as long
over 64 tokens, 2.3 x over 256, 2.5 x over 512, 2.0 x over 1024; with 32 heads of 128, 8 of keys, 3.2 x over 256 and 2.3 x over
1024. Errors against float64 are equal. In float32 the two are as quick as each other (0.75 to 1.2 x): torch's is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253

BLOCK = 128
"""Queries at a time. They see no key after their last one, so that almost half the products need not be computed."""

KEPT = 256
"""Tokens up to which the weights are kept for the backward pass. Of longer samples they would outgrow all else, and are
made again there, which costs a fifth more."""


def is_quicker(query: Tensor, dropout: float) -> bool:
    """Whether to attend this way."""
    return query.dtype == torch.bfloat16 and query.device.type == "cpu" and not dropout


class BlockedAttention(torch.autograd.Function):
    """softmax(scale q k^T) v, causal: q [1, H, T, D], k and v [1, Hk, T, D] -> [1, T, H, D].

    Heads that share a key (H > Hk) are stacked along the tokens, so that every product is one of Hk matrices.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        queries, keys, values = _grouped(q, k), k[0], v[0]
        outputs, kept = [], []
        for start, stop in _blocks(q):
            weights = _weights(queries[:, :, start:stop].flatten(1, 2), keys[:, :stop], scale, queries.shape[1])
            outputs.append((weights @ values[:, :stop]).view(*queries.shape[:2], stop - start, -1))
            if q.shape[2] <= KEPT:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale = scale
        return torch.cat(outputs, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        queries, keys, values = _grouped(q, k), k[0], v[0]
        upper = _grouped(gradients[0].transpose(1, 2), k)
        wide = torch.promote_types(k.dtype, torch.float32)  # several blocks are added up
        by_key, by_value = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
        by_query = []
        for number, (start, stop) in enumerate(_blocks(q)):
            block, above = (x[:, :, start:stop].flatten(1, 2) for x in (queries, upper))
            weights = kept[number] if kept else _weights(block, keys[:, :stop], ctx.scale, queries.shape[1])
            by_value[:, :stop] += weights.mT @ above
            by_weights = above @ values[:, :stop].mT
            slope = torch.ops.aten._softmax_backward_data(by_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            by_query.append((slope @ keys[:, :stop]).view(*queries.shape[:2], stop - start, -1))
            by_key[:, :stop] += slope.mT @ block
        return torch.cat(by_query, 2).view_as(q), by_key.to(k.dtype).view_as(k), by_value.to(v.dtype).view_as(v), None


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """[1, H, T, D] -> [Hk, H / Hk, T, D]."""
    return x[0].unflatten(0, (k.shape[1], -1))


def _blocks(q: Tensor) -> Iterator[tuple[int, int]]:
    """Where blocks of queries start and stop."""
    length = q.shape[2]
    return ((start, min(length, start + BLOCK)) for start in range(0, length, BLOCK))


def _weights(block: Tensor, keys: Tensor, scale: float, heads: int) -> Tensor:
    """Weights [Hk, heads * n, S] of n queries, those of each head after those of the one before, over S keys.

    The last n keys are the queries' own.
    """
    count, seen = block.shape[1] // heads, keys.shape[1]
    future = block.new_zeros(count, seen)
    future[:, seen - count :] = torch.full_like(future[:, :count], float("-inf")).triu_(1)
    return torch.baddbmm(future.repeat(heads, 1), block, keys.mT, alpha=scale).softmax(-1)
