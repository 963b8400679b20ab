"""Look at what flows through the modules a config would adapt, before the adapter is attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peftcli.adapters.base import Adapter
    from peftcli.adapters.config import TunerConfig
    from peftcli.adapters.sites import Site


def linear_sites(model: nn.Module, config: TunerConfig, *, purpose: str) -> dict[str, tuple[Site, Adapter]]:
    """The linear sites a config adapts, by path, with the adapter each would get.

    Raises:
        InputError: for targets of another kind.
    """
    from peftcli.adapters.planning import plan_sites

    sites = {site.name: (site, adapter) for site, adapter in plan_sites(model, config)}
    for name, (site, _) in sites.items():
        if site.kind != "linear":
            raise InputError(f"{purpose} starts linear layers only, not a {type(site.module).__name__}", place=name)
    return sites


@contextmanager
def inputs_seen(modules: dict[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(path, inputs [tokens, in])` for every forward pass of the modules inside the `with`."""

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            see(name, args[0].detach().flatten(0, -2).float())

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
