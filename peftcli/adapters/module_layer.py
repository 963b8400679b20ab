"""Whole modules that are adapted as they are: what an adapter computes from their inputs is added to their output."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253

from peftcli.adapters.base import SideAdapter, SiteShape
from peftcli.adapters.context import BASE
from peftcli.adapters.layer import AdapterLayer
from peftcli.adapters.sites import Site


class ModuleSite(Site):
    """A module that is no matrix, such as a block of attention. Its size is that of the hidden states it works on."""

    kind = "module"
    module: Any  # with a transformers config

    @property
    def shape(self) -> SiteShape:
        width = self.module.config.hidden_size
        return SiteShape(self.name, self.kind, width, width)

    @property
    def stored(self) -> Tensor:
        """Any of its weights, for its precision and place: a floating one, unless all are quantised."""
        parameters = list(self.module.parameters())
        return next((parameter for parameter in parameters if parameter.is_floating_point()), parameters[0])


class ModuleLayer(AdapterLayer):
    """y = module(x) + what each adapter computes beside it from x. Rows of several adapters may share a batch."""

    def _forward(self, names: list[str], *args: Any, **kwargs: Any) -> Any:
        return self._with_sides(dict.fromkeys(names), *args, **kwargs)

    def _forward_mixed(self, *args: Any, **kwargs: Any) -> Any:
        batch = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).shape[0]
        groups = self.context.rows_by_adapter(batch)
        return self._with_sides(
            {name: rows for name, rows in groups.items() if name != BASE and name in self.adapters}, *args, **kwargs
        )

    def _with_sides(self, rows: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The module's output with the sides of adapters added to their rows; None means all rows."""
        output = self.base_layer(*args, **kwargs)
        inputs = kwargs | dict(zip(inspect.signature(self.base_layer.forward).parameters, args, strict=False))
        y = output[0] if isinstance(output, tuple) else output
        for name, side in self._sides(list(rows), inputs):
            kept = rows[name]
            if kept is None:
                y = y + side.to(y.dtype)
            else:
                index = torch.tensor(kept, device=y.device)
                y = y.index_add(0, index, side.index_select(0, index).to(y.dtype))
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _sides(self, names: list[str], inputs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            adapter = self.adapters[name]
            assert isinstance(adapter, SideAdapter)
            yield name, adapter.side(self.tensors(name), self.base_layer, inputs)
