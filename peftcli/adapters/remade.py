"""Tensors that are made again in the backward pass instead of being kept for it.

Norms, activations and products of two tensors cost little, but what they give is as large as what matrix products give,
and is kept for the backward passes of those. `remade` runs such an operation and keeps its inputs alone. Its output
knows how it was made, so that an adapted layer keeps those inputs, too (the same tensors), and not the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253

Operation = Callable[..., Tensor]


class Recipe:
    """An operation, and its output made again, which all who need it in a backward pass share.

    Args:
        operation: gives the same output for the same inputs, and reaches no other tensor that gets a gradient.
    """

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self._made: tuple[list[Tensor], Tensor] | None = None

    def output(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The output, detached."""
        return self._run(inputs)[1].detach()

    def gradients(self, inputs: tuple[Tensor, ...], upper: Tensor) -> tuple[Tensor, ...]:
        """Of the inputs, from the output's. It is asked for last, so that the output is dropped then."""
        fresh, output = self._run(inputs)
        self._made = None
        return torch.autograd.grad(output, fresh, upper)

    def _run(self, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
        if self._made is None:
            with torch.enable_grad():
                fresh = [x.detach().requires_grad_() for x in inputs]
                self._made = fresh, self.operation(*fresh)
        return self._made


class Origin(NamedTuple):
    """How a tensor was made. Whoever needs it in a backward pass keeps the inputs with `save_for_backward`."""

    recipe: Recipe
    inputs: tuple[Tensor, ...]
    version: int
    """Of the tensor, as it was made: it may be changed in place afterwards."""


def remade(operation: Operation, *inputs: Tensor) -> Tensor:
    """`operation(*inputs)`, made again in the backward pass. All inputs require gradients."""
    recipe = Recipe(operation)
    output = _Remade.apply(recipe, *inputs)
    vars(output)["origin"] = Origin(recipe, inputs, output._version)
    return output


def origin(x: Tensor) -> Origin | None:
    """How a tensor was made, where `remade` made it and it still is what it was."""
    if torch.compiler.is_compiling():  # tensors of a graph that is being made have no memory; the compiler decides
        return None
    made: Origin | None = vars(x).get("origin")
    return made if made is not None and made.version == x._version else None


class _Remade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.recipe = recipe
        return recipe.operation(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.recipe.gradients(ctx.saved_tensors, gradients[0])
