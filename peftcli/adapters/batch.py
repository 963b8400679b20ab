"""What a caller says about one batch: the adapter and the task of each row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters.context import check_adapter_names
from peftcli.adapters.engine import Attached, adapters_of
from peftcli.errors import InputError


@contextmanager
def batch_facts(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    adapter_names: list[str] | None,
    task_ids: Tensor | None,
    *,
    generating: bool = False,
) -> Iterator[None]:
    """Tell the adapters of a model about the batch that runs inside the `with`.

    Args:
        model: a PeftModel.
        args, kwargs: what the model is called with.
        adapter_names: the adapter of each row (`__base__` for none), or None where all rows use the active ones.
        task_ids: the task of each row [B]. It stays set: checkpointing recomputes layers in the backward pass.
        generating: whether `generate` makes the inputs of the passes.

    Raises:
        InputError: if rows can't have adapters of their own now.
    """
    attached = adapters_of(model)
    context = attached.context
    if adapter_names is not None:
        _check(attached, model.training, adapter_names, _batch_size([*args, *kwargs.values()]))
        context.adapter_names = list(adapter_names)
    context.task_ids, context.generating = task_ids, generating
    context.input_ids = _token_ids(args, kwargs)
    try:
        yield
    finally:
        context.adapter_names, context.generating = None, False


def _check(attached: Attached, training: bool, names: list[str], rows: int | None) -> None:
    if attached.gates:
        raise InputError("`adapter_names` can't be used with a gate: it decides what each row gets")
    if len(attached.prompts):
        raise InputError("`adapter_names` can't be used with prompts: the whole batch gets the active one")
    if any(adapter.rows_interact for name in set(names) & set(attached.configs) for adapter, _ in attached.sites(name)):
        raise InputError("`adapter_names` can't be used with an adapter that looks at the whole batch")
    check_adapter_names(names, list(attached.configs), rows)
    if training:
        raise InputError("Cannot pass `adapter_names` when the model is in training mode.")
    if attached.merged:
        raise InputError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    if attached.biases:
        raise InputError("Cannot pass `adapter_names` when an adapter trains biases of the base model.")


def _token_ids(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The token ids [B, T] among a model's inputs; `generate` calls them `inputs`, too."""
    found = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    is_ids = isinstance(found, Tensor) and found.dim() == 2 and not found.is_floating_point()
    return found if is_ids else None


def _batch_size(inputs: Sequence[Any]) -> int | None:
    """The first dimension of the first tensor that has one."""
    sizes = (value.shape[0] for value in inputs if isinstance(value, Tensor) and value.dim())
    return next(sizes, None)
