"""What code written against PEFT reads, sets and calls on an adapted module: `layer.scaling["default"]` and the like."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn  # noqa: TID253

from peftcli.adapters.base import Adapter


class Scalings(dict[str, Any]):
    """The scaling of every adapter, by adapter name. Setting one sets the adapter's."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        super().__init__({name: adapter.scaling for name, adapter in adapters.items()})
        self._adapters = adapters

    def __setitem__(self, name: str, value: float) -> None:
        self._adapters[name].scaling = value
        super().__setitem__(name, value)


class PeftNames(nn.Module):
    """PEFT's names, derived from the adapters; no method has one of its own."""

    base_layer: nn.Module
    adapters: dict[str, Adapter]
    active_adapters: list[str]
    merged_adapters: list[str]

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to `scale` times its initial one."""
        if adapter in self.adapters:
            self.adapters[adapter].scaling = scale * self.adapters[adapter].initial_scaling()

    def scale_layer(self, scale: float) -> None:
        """Let the active adapters act `scale` times as strongly."""
        for name in self.active_adapters:
            self.adapters[name].scaling *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; without a scale, bring the initial scaling back."""
        for name in self.active_adapters:
            adapter = self.adapters[name]
            adapter.scaling = adapter.initial_scaling() if scale is None else adapter.scaling / scale

    def __getattr__(self, name: str) -> Any:
        """Registered tensors first, then the module's attributes, then a per-adapter view (`scaling["default"]`)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = super().__getattr__("base_layer")
            if hasattr(module, name):
                return getattr(module, name)
            view = self._view(name)
            if view is None:
                raise
            return view

    def _view(self, name: str) -> Mapping[str, Any] | None:
        """An attribute of every adapter, or of its config, by adapter name; read-only but for the scaling."""
        adapters = self.__dict__.get("adapters", {})
        if name == "scaling":
            return Scalings(adapters)
        for owner in (lambda adapter: adapter, lambda adapter: adapter.config):
            if any(hasattr(owner(adapter), name) for adapter in adapters.values()):
                return MappingProxyType({key: getattr(owner(adapter), name, None) for key, adapter in adapters.items()})
        return None
