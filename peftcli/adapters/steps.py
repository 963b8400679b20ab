"""What methods do in training besides taking gradients: their own term of the loss, and what follows each step."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor  # noqa: TID253

from peftcli.adapters.base import Adapter, Tensors
from peftcli.adapters.config import PeftConfig
from peftcli.adapters.engine import Attached
from peftcli.adapters.registry import adapter_class


def begin_training(attached: Attached | None, total_steps: int) -> None:
    """Tell the adapters that are trained how many optimizer steps there will be.

    Raises:
        InputError: a schedule does not fit into them.
    """
    for config, _, _ in _trained(attached):
        config.begin_training(total_steps)


def add_regularization(attached: Attached | None, loss: Tensor) -> Tensor:
    """The loss () with the terms that methods add to it (AdaLoRA's orthogonality)."""
    for config, method, sites in _trained(attached):
        term = method.regularization(sites, config)
        loss = loss if term is None else loss + term.to(loss)
    return loss


def follows_steps(attached: Attached | None) -> bool:
    """Whether any method that is trained has something to do in `after_step`."""
    return any(method.after_step.__func__ is not Adapter.after_step.__func__ for _, method, _ in _trained(attached))  # type: ignore[attr-defined]


def after_step(attached: Attached | None, step: int) -> None:
    """What methods do after an optimizer step, gradients still there. `step` counts from 1."""
    for config, method, sites in _trained(attached):
        method.after_step(sites, config, step)


def _trained(attached: Attached | None) -> Iterator[tuple[PeftConfig, type[Adapter], list[tuple[Adapter, Tensors]]]]:
    """(config, method, its sites) of each active adapter that is not frozen."""
    if attached is None:
        return
    for name in attached.active:
        config = attached.configs[name]
        if config.inference_mode or config.is_prompt_learning:
            continue
        method = adapter_class(config)
        sites = [(adapter, p) for adapter, p in attached.sites(name) if isinstance(adapter, method)]
        if sites:
            yield config, method, sites
