"""Facts about the running batch that adapters need: which adapter each row uses, task numbers, gate scalings.

They stay set until the next forward pass begins, so that recomputation under gradient checkpointing sees what the first
pass saw, and nothing is tunnelled through the layers' arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        gate_scalings: weights a gate gave to adapters, for X-LoRA.
        generating: whether `generate` makes the inputs, not a caller.
    """

    adapter_names: list[str] | None = None
    task_ids: Tensor | None = None
    gate_scalings: Any = None
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
