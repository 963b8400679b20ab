"""Norms, activations and gated products of a model made again in the backward pass, instead of being kept for it.

Of a llama's layer that is more than half of what is kept, and made again in a few percent of a step's time. What runs
is the model's own code both times, so the gradients are the same but for the order of sums. Sharded bases are left alone: in the
backward pass a norm's weight need not be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters.remade import remade

ACTIVATIONS = (nn.SiLU, nn.GELU, nn.ReLU, nn.Tanh)
"""torch's own; transformers' are known by where they come from."""


def kept_activations(model: nn.Module, *, checkpointing: bool, sharded: bool) -> AbstractContextManager[None]:
    """Inside, passes of `model` keep what a run's do.

    Args:
        model: what is trained.
        checkpointing: whole layers are run again in the backward pass, their norms and activations with them.
        sharded: processes share the base.
    """
    return nullcontext() if checkpointing or sharded else sparing(model)


@contextmanager
def sparing(model: nn.Module) -> Iterator[None]:
    """Inside, passes of `model` keep less."""
    gated = [module for module in model.modules() if is_gated(module)]
    inner = {module.act_fn for module in gated}
    small = [module for module in model.modules() if _is_small(module) and module not in inner]
    changed = {module: _gated_forward(module) for module in gated} | {
        module: _small_forward(module) for module in small
    }
    changed = {module: forward for module, forward in changed.items() if "forward" not in vars(module)}
    for module, forward in changed.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


def is_gated(module: Any) -> bool:
    """Whether a module computes down(act(gate(x)) * up(x)): tried on a number, with simple functions for its parts."""
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")):
        return False
    parts = SimpleNamespace(
        gate_proj=lambda x: x + 2, act_fn=lambda x: x**3, up_proj=lambda x: 5 * x, down_proj=lambda x: 7 - x
    )
    try:
        same = type(module).forward(parts, 11) == 7 - (11 + 2) ** 3 * (5 * 11)
    except Exception:  # it does something else with its parts
        return False
    return same and isinstance(module.act_fn, nn.Module)


def _gated_forward(module: Any) -> Callable[[Tensor], Tensor]:
    def product(gate: Tensor, up: Tensor) -> Tensor:
        return module.act_fn(gate) * up

    def forward(x: Tensor) -> Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        inner = remade(product, gate, up) if _may_be_remade(module.act_fn, gate, up) else product(gate, up)
        return module.down_proj(inner)

    return forward


def _is_small(module: nn.Module) -> bool:
    """Whether a module is a norm over features or an activation: nothing but its input decides what it gives."""
    kind = type(module)
    norm = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or kind.__name__.endswith("RMSNorm")
    activation = isinstance(module, ACTIVATIONS) or kind.__module__ == "transformers.activations"
    return (norm or activation) and not any(True for _ in module.children())


def _small_forward(module: nn.Module) -> Callable[..., Any]:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and _may_be_remade(module, args[0]):
            return remade(original, args[0])
        return original(*args, **kwargs)

    return forward


def _may_be_remade(module: nn.Module, *inputs: Tensor) -> bool:
    """Whether all that gets a gradient is the inputs, and they will be met again as they are now."""
    wanted = torch.is_grad_enabled() and all(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    trained = any(parameter.requires_grad for parameter in module.parameters())
    return wanted and not trained and not torch.is_autocast_enabled(inputs[0].device.type)
