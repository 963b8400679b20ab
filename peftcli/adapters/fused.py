"""A linear layer and a low-rank update as one operation: y = g * (W x + B A x) + b, with W frozen.

Left to autograd, the update is a tensor of its own, then the sum another, forward and backward. Here each product is
added where it belongs, and what the backward pass keeps is x (or what x is made of) and A x.
"""

from __future__ import annotations

from typing import Any

import torch  # noqa: TID253
import torch.nn.functional as F  # noqa: TID253
from torch import Tensor  # noqa: TID253

from peftcli.adapters.remade import Origin, origin


def linear_with_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gain: Tensor | None = None
) -> Tensor:
    """g * (W x + B A x) + b.

    Args:
        x: [..., in].
        weight, bias: [out, in] and [out] or None; they get no gradient.
        a, b: [r, in] and [out, r]; the small ones, so they are cast to x's precision.
        gain: [out], DoRA's factor on each output; None is 1.
    """
    a, b = a.to(x.dtype), b.to(x.dtype)
    more = None if gain is None else (gain - 1).to(x.dtype)  # near 1, bfloat16 has steps of 0.008
    if torch.is_grad_enabled():
        return _LinearWithUpdate.apply(x, weight, bias, a, b, more, origin(x))
    return _forward(x.flatten(0, -2), weight, bias, a, b, more)[0].unflatten(0, x.shape[:-1])


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, more: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The output [N, out], A x [N, r], and the output without the bias, for `more` = g - 1."""
    hidden = x @ a.T
    if more is None:
        y = F.linear(x, weight, bias).addmm_(hidden, b.T)
        return y, hidden, y
    scaled = F.linear(x, weight).addmm_(hidden, b.T)
    scaled.addcmul_(scaled, more)
    return scaled if bias is None else scaled + bias, hidden, scaled


class _LinearWithUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        more: Tensor | None,
        made: Origin | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y, hidden, scaled = _forward(flat, weight, bias, a, b, more)
        ctx.recipe = None if made is None else made.recipe
        kept = (flat,) if made is None else made.inputs
        # DoRA's own gradient needs the outputs; the next operation often keeps them anyway.
        ctx.save_for_backward(weight, a, b, hidden, more, scaled if more is not None else None, *kept)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b, hidden, more, scaled, *kept = ctx.saved_tensors
        x = kept[0] if ctx.recipe is None else ctx.recipe.output(kept).reshape(-1, weight.shape[1])
        upper = gradients[0].reshape(-1, gradients[0].shape[-1])
        by_gain = None
        if more is not None:
            wide = torch.promote_types(more.dtype, torch.float32)
            by_gain = ((upper * scaled).sum(0, dtype=wide) / (1 + more.to(wide))).to(more.dtype)
            upper = torch.addcmul(upper, upper, more)
        small = upper @ b
        by_x = (upper @ weight).addmm_(small, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return by_x, None, None, small.T @ x, upper.T @ hidden, by_gain, None
