"""A base that is loaded once and takes its adapters on: all in one batch where they can be mixed, else one by one.

A model that was trained in full stands beside the base while it has its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch  # noqa: TID253

from peftcli.adapters.config import PeftConfig
from peftcli.adapters.context import BASE
from peftcli.adapters.model import PeftModel
from peftcli.errors import InputError, printable

BASE_COLUMN = "base"


class _Together(PeftModel):
    """A model with adapters of any methods: only one is used for a row, so they need not fit each other."""

    def _check_same_method(self, peft_config: PeftConfig) -> None:
        """Methods may differ."""

    @classmethod
    def class_for(cls, config: PeftConfig) -> type[PeftModel]:
        return cls


@dataclass(frozen=True)
class Turn:
    """A model, and who answers in one pass over the data.

    Args:
        model: takes batches, and `adapter_names` if there are `adapters`; in eval mode.
        columns: `base` and names of adapters.
        adapters: what each column is called in the model, where rows of several are mixed in one batch; None: the
            model as it stands is the one column.
    """

    model: Any
    columns: tuple[str, ...]
    adapters: tuple[str, ...] | None = None


@dataclass
class Bench:
    """A base with the adapters, and the models trained in full, that are compared with it.

    Args:
        base: a model without adapters; it is lent, and comes back as it was.
        folders: of each adapter or model, by its column.
        whole: what loads the models trained in full, by their columns.

    Attributes:
        alone: what can't share batches with others, and why, by its column. Known once the bench is made.

    Raises:
        InputError: an adapter can't be loaded; before anything is computed.
    """

    base: Any
    folders: Mapping[str, Path | str]
    whole: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base.eval()
        for column in self.folders:
            reason = "it is a whole model" if column in self.whole else self._why_alone(column)
            if reason is not None:
                self.alone[column] = reason

    @property
    def columns(self) -> tuple[str, ...]:
        return (BASE_COLUMN, *self.folders)

    def turns(self) -> Iterator[Turn]:
        """Every column once, in as few passes as there can be. A turn is over when the next one is asked for."""
        model, names = self._together()
        if model is None:
            yield Turn(self.base, (BASE_COLUMN,))
        else:
            yield Turn(model, (BASE_COLUMN, *names), (BASE, *names.values()))
            model.attached.unload(merge=False)
        yield from self._each(self.alone)

    def one_by_one(self) -> Iterator[Turn]:
        """Every column in a turn of its own, the base first."""
        yield Turn(self.base, (BASE_COLUMN,))
        yield from self._each(self.folders)

    def _each(self, columns: Iterable[str]) -> Iterator[Turn]:
        for column in columns:
            if column in self.whole:
                model = self.whole[column]()
                yield Turn(model, (column,))
                model.to("meta")  # its memory is free, whoever still holds it
                continue
            model = PeftModel.from_pretrained(self.base, self.folders[column])
            yield Turn(model, (column,))
            model.attached.unload(merge=False)

    def _together(self) -> tuple[PeftModel | None, dict[str, str]]:
        """The base with every adapter that can share its batches, and their names in it by column."""
        model, names = None, {}
        for number, (column, folder) in enumerate(self.folders.items()):
            if column in self.alone:
                continue
            name = f"adapter{number}"
            try:
                if model is None:
                    model = _Together.from_pretrained(self.base, folder, name)
                else:
                    model.load_adapter(folder, name)
            except InputError as error:  # alone it loads: it can't stand beside the others
                self.alone[column] = error.problem if hasattr(error, "problem") else printable(error)
                continue
            names[column] = name
        return model, names

    def _why_alone(self, column: str) -> str | None:
        """Load an adapter by itself and try a batch of a base's row and its own; None if that works."""
        model = PeftModel.from_pretrained(self.base, self.folders[column])
        try:
            if getattr(model.active_peft_config, "layer_replication", None):
                return "it repeats layers of the base"
            _try_mixed(model)
        except InputError as error:
            return error.problem
        finally:
            model.attached.unload(merge=False)
        return None


@torch.no_grad()
def _try_mixed(model: PeftModel) -> None:
    """Raises:
    InputError: rows can't have adapters of their own in this model.
    """
    tokens = torch.ones((2, 2), dtype=torch.long, device=model.device)
    inputs = {"input_ids": tokens, "attention_mask": tokens}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    tasks = torch.zeros(2, dtype=torch.long, device=model.device)
    model(**inputs, adapter_names=[BASE, model.active_adapter], task_ids=tasks)
