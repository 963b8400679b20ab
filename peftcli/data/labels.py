"""The classes of a data set: from names or numbers to indices, in an order that does not depend on the rows' order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftcli.data.task_formats import Label
from peftcli.errors import InputError, nearest, printable
from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_SHOWN = 12  # classes in a message


class Labels:
    """Gives each class its index.

    Args:
        names: the classes in their order, as `model.labels` has them; None: those of the training data, sorted. Numbers
            are then their own names; with `names` a number is an index into them.
    """

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self._given = names is not None
        self._closed = self._given
        self._indices: dict[Label, int] = {name: index for index, name in enumerate(names or ())}

    def index(self, label: Label, column: str) -> int:
        """The class's index; before `settle` in order of appearance.

        Raises:
            InputError: an unknown class, or numbers among names.
        """
        if self._given and isinstance(label, int):
            if 0 <= label < len(self._indices):
                return label
        elif label in self._indices:
            return self._indices[label]
        elif not self._closed:
            if self._indices and type(label) is not type(next(iter(self._indices))):
                raise InputError(f"is {printable(repr(label))}: some labels are numbers, others words", field=column)
            return self._indices.setdefault(label, len(self._indices))
        raise InputError(
            f"is {printable(repr(label))}, which is no class "
            + ("of model.labels" * self._given or "of the training data"),
            field=column,
            allowed=self._shown(),
            fix=str(nearest(str(label), [str(name) for name in self._indices])) or None,
        )

    def close(self) -> None:
        """Take no further classes: those of the training data are known."""
        self._closed = True

    def settle(self) -> tuple[list[str], NDArray[np.int64]]:
        """The classes' names in their final order, and [classes] the final index of each index given so far.

        Raises:
            InputError: there is one class only.
        """
        if len(self._indices) < 2:
            raise InputError(f"has one class only ({self._shown()}): nothing can be learnt", field="data.train: label")
        order = list(self._indices) if self._given else sorted(self._indices)
        final = {label: place for place, label in enumerate(order)}
        return [str(label) for label in order], np.array([final[label] for label in self._indices], np.int64)

    def _shown(self) -> str:
        names = [printable(str(name), 60) for name in self._indices]
        return " ".join(names[:MOST_SHOWN]) + f" ... ({len(names)} in all)" * (len(names) > MOST_SHOWN)
