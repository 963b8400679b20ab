"""What code written against PEFT reads, sets and calls on an adapted module: `layer.scaling["default"]` and the like."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn  # noqa: TID253

from peftcli.adapters.base import Adapter
from peftcli.adapters.quantized import backend_of
from peftcli.adapters.sites import Site

LAYER_PREFIXES = {
    "ADALORA": "adalora.SVD",
    "BEFT": "",
    "C3A": "c3a.C3A",
    "DEFT": "deft.Deft",
    "DELORA": "delora.Delora",
    "FOURIERFT": "fourierft.FourierFT",
    "GLORA": "Glora",
    "HRA": "hra.HRA",
    "IA3": "",
    "MISS": "miss.Miss",
    "PSOFT": "",
    "SUPERTUNING": "",
    "UNILORA": "",
    "WAVEFT": "waveft.WaveFT",
}
"""What PEFT puts in front of the kind of layer in a layer's name, where that isn't `<method>.`."""

LORA_CONTAINERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
"""What every LoRA layer of PEFT has, if empty."""


def layer_name(peft_type: str, site: Site) -> str:
    """PEFT's name of the layer that adapts a site, as `repr` and status reports show it, e.g. `lora.Linear`."""
    kinds = {"attention": "MultiheadAttention", "parameter": "ParamWrapper", "linear": "Linear"}
    quantized = backend_of(site.module) is not None
    kind = type(site.module).__name__ if quantized else kinds.get(site.kind, type(site.module).__name__)
    return LAYER_PREFIXES.get(peft_type, f"{peft_type.lower()}.") + kind


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
    site: Site
    _slots: dict[str, list[Any]]
    adapters: dict[str, Adapter]
    active_adapters: list[str]
    merged_adapters: list[str]
    disable_adapters: bool
    own_tensors: Callable[[str], Iterator[tuple[Any, Any]]]

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    def _get_name(self) -> str:
        """The first word of `repr`."""
        types = [adapter.config.peft_type for adapter in self.adapters.values()]
        return layer_name(types[0], self.site) if types else super()._get_name()

    def get_base_layer(self) -> nn.Module:
        """The module of the base model, below any layers on top of one another."""
        layer = self.base_layer
        while isinstance(layer, PeftNames):
            layer = layer.base_layer
        return layer

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The attributes that hold what adapters train."""
        mine = (slot.head for name in self.adapters for slot in self._slots[name] if slot.spec.trainable)
        lora = LORA_CONTAINERS[:4] if self._is_lora() else ()
        return tuple(dict.fromkeys((*lora, *mine)))

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters of this layer on or off; what is switched off is not trained."""
        self.disable_adapters = not enabled
        self._train_only(self.active_adapters if enabled else [])

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones of this layer; their tensors get gradients, unless `inference_mode`."""
        self.active_adapters = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._train_only([] if inference_mode else self.active_adapters)

    def _train_only(self, names: Sequence[str]) -> None:
        for name in self.adapters:
            for slot, tensor in self.own_tensors(name):
                if slot.spec.trainable:
                    tensor.requires_grad_(name in names)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to `scale` times its initial one."""
        if adapter in self.adapters:
            self.adapters[adapter].scaling = scale * self.adapters[adapter].initial_scaling()

    def scale_layer(self, scale: float) -> None:
        """Let the active adapters act `scale` times as strongly."""
        for name in self._active_here():
            self.adapters[name].scaling *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; without a scale, bring the initial scaling back."""
        for name in self._active_here():
            adapter = self.adapters[name]
            adapter.scaling = adapter.initial_scaling() if scale is None else adapter.scaling / scale

    def _is_lora(self) -> bool:
        return any(adapter.config.peft_type == "LORA" for adapter in self.__dict__.get("adapters", {}).values())

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.adapters]

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

    def _view(self, name: str) -> Any:
        """An attribute of every adapter, or of its config, by adapter name; read-only but for the scaling."""
        adapters = self.__dict__.get("adapters", {})
        if name == "scaling":
            return Scalings(adapters)
        if name == "lora_dropout":
            return {key: _dropout(adapter) for key, adapter in adapters.items()}
        if name in LORA_CONTAINERS and self._is_lora():
            return nn.ModuleDict()
        if name in ("in_features", "out_features"):
            return getattr(self.site.shape, name)
        if name == "fan_in_fan_out":  # one fact of the module
            return any(getattr(adapter.config, name, False) for adapter in adapters.values())
        for owner in (lambda adapter: adapter, lambda adapter: adapter.config):
            if any(hasattr(owner(adapter), name) for adapter in adapters.values()):
                return MappingProxyType({key: getattr(owner(adapter), name, None) for key, adapter in adapters.items()})
        return None


class _LoraLayers(type):
    def __instancecheck__(cls, layer: object) -> bool:
        return isinstance(layer, PeftNames) and layer._is_lora()


class LoraLayer(metaclass=_LoraLayers):
    """PEFT's name, for `isinstance`: a layer that has a LoRA adapter."""


def _dropout(adapter: Adapter) -> nn.Module:
    p = getattr(adapter.config, "lora_dropout", 0.0)
    return nn.Dropout(p) if p else nn.Identity()
