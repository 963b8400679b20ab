"""Facts about the running batch that adapters need: which adapter each row uses, task numbers, gate scalings.

They stay set until the next forward pass begins, so that recomputation under gradient checkpointing sees what the first
pass saw, and nothing is tunnelled through the layers' arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftcli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

BASE = "__base__"
"""The name that stands for the bare base model in `adapter_names`."""


@dataclass
class ForwardContext:
    """What the current forward pass is about.

    Attributes:
        adapter_names: the adapter of each row of the batch, or None when all rows use the active ones.
        task_ids: the task of each row [B], for methods that route by task.
        input_ids: the token ids [B, T] the model is called with; while generating, the prompt's.
        gate_scalings: gives the weight of an adapter at a module (its path), [B, T] or one number, where a gate decides.
        generating: whether `generate` makes the inputs, not a caller.
    """

    adapter_names: list[str] | None = None
    task_ids: Tensor | None = None
    input_ids: Tensor | None = None
    gate_scalings: Callable[[str, str], Tensor | float] | None = None
    generating: bool = False

    def rows_by_adapter(self, rows: int) -> dict[str, list[int]]:
        """Row numbers of a batch of `rows` rows, by adapter name. Beam search repeats each name."""
        names = self.adapter_names or []
        if not names or rows % len(names):
            raise InputError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {rows} respectively."
            )
        repeats = rows // len(names)
        groups: dict[str, list[int]] = {}
        for row in range(rows):
            groups.setdefault(names[row // repeats], []).append(row)
        return groups

    def share(self, site: str, adapter: str) -> Tensor | float:
        """What an adapter's update at a module is multiplied by: 1, unless a gate decides."""
        return 1.0 if self.gate_scalings is None else self.gate_scalings(site, adapter)

    def tasks(self, rows: int) -> Tensor:
        """The task of each of `rows` rows. Beam search and layers that see tokens one by one repeat each row's.

        Raises:
            InputError: if the caller named no tasks, or not as many as there are rows.
        """
        if self.task_ids is None:
            raise InputError(
                "task_ids should not be None.", field="task_ids", fix="give the task of each row of the batch"
            )
        if self.task_ids.dim() != 1 or not len(self.task_ids) or rows % len(self.task_ids):
            raise InputError(
                f"{list(self.task_ids.shape)} tasks for {rows} rows", field="task_ids", allowed="one for each row"
            )
        return self.task_ids.repeat_interleave(rows // len(self.task_ids))

    @contextmanager
    def only(self, rows: list[int], of: int) -> Iterator[None]:
        """While open, the batch is `rows` out of `of` rows."""
        before = self.task_ids, self.input_ids
        if self.task_ids is not None:
            self.task_ids = self.tasks(of)[rows]
        if self.input_ids is not None:
            self.input_ids = self.input_ids.repeat_interleave(of // len(self.input_ids), 0)[rows]
        try:
            yield
        finally:
            self.task_ids, self.input_ids = before


def check_adapter_names(names: Sequence[str], known: Sequence[str], rows: int | None) -> None:
    """Refuse names of a mixed batch that no adapter has, or too few of them, in PEFT's words."""
    if rows is not None and rows != len(names):
        raise InputError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {rows} respectively."
        )
    unknown = sorted(set(names) - set(known) - {BASE})
    if unknown:
        raise InputError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}",
            allowed=", ".join([*known, BASE]),
        )
