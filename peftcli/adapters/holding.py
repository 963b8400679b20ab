"""`TensorHolder`: the tensors of several adapters at one module, registered under PEFT's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters.base import Adapter, Tensors, TensorSpec, fill
from peftcli.adapters.context import ForwardContext
from peftcli.adapters.sites import Site


@dataclass(frozen=True)
class Slot:
    """Where one tensor of one adapter lives: `layer.<head>.<adapter>[.<leaf>]`. A head may be a path."""

    key: str
    spec: TensorSpec
    head: str
    leaf: str


class Weights(nn.Module):
    """Holds the tensors that PEFT keeps in a small module, e.g. `lora_A.default` with its `weight`."""

    weight: Tensor


class Buffers(nn.Module):
    """An adapter-name -> tensor map of state that is not trained."""

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(name)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor)

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __contains__(self, name: str) -> bool:
        return name in self._buffers

    def __len__(self) -> int:
        return len(self._buffers)


class TensorHolder(nn.Module):
    """Owns adapters' tensors: `lora_A.<adapter>.weight`, `ia3_l.<adapter>`, and those kept once a model.

    Args:
        site: the module seen as a matrix.
        context: facts about the running batch, shared by all layers of a model.
    """

    def __init__(self, site: Site, context: ForwardContext) -> None:
        super().__init__()
        self.site, self.context = site, context
        self.adapters: dict[str, Adapter] = {}
        self.active_adapters: list[str] = []
        self._shared: dict[str, dict[str, Any]] = {}
        self._slots: dict[str, list[Slot]] = {}
        self._leaders: dict[str, Any] = {}

    def add(
        self,
        name: str,
        adapter: Adapter,
        *,
        shared: Mapping[str, nn.Module] | None = None,
        dtype: torch.dtype,
        device: torch.device,
        initialize: bool = True,
        layer_at: Callable[[str], TensorHolder] | None = None,
    ) -> None:
        """Give the layer an adapter and allocate its tensors; on the meta device they stay empty.

        `shared` holds the tensors kept once a model, by name and then adapter; every layer registers the same modules.
        `layer_at` finds the layers before this one that own some of its tensors, by their module's path.
        """
        self._hold(name, adapter)
        self._shared[name] = dict(shared or {})
        for key, bank in self._shared[name].items():
            self._register_bank(name, key, bank)
        self._slots[name] = []
        for key, spec in adapter.tensors().items():
            if spec.shared:
                continue
            if spec.owner and layer_at:
                tensor = layer_at(spec.owner).tensors(name)[key]
            else:
                kind = getattr(torch, spec.dtype) if spec.dtype else dtype
                tensor = torch.empty(spec.shape, dtype=kind, device=device)
                if initialize and device.type != "meta":
                    fill(tensor, spec.init)
            live = spec.live or key
            head, _, leaf = (live[:-1], "", "") if live.endswith(".") else live.partition(".")
            slot = Slot(key, spec, head, leaf)
            self._slots[name].append(slot)
            self._place(name, slot, tensor)
        if device.type != "meta":
            with torch.no_grad():
                begin = adapter.initialize if initialize else adapter.regenerate
                new_weight = begin(self.tensors(name))
                if new_weight is not None:
                    self.site.stored.copy_(self.site.to_stored(new_weight))

    def _register_bank(self, name: str, key: str, bank: Any) -> None:
        """Register tensors kept once a model; `tinylora_v.0` under PEFT's live name `tinylora_v.<name>.0`."""
        head, _, leaf = key.partition(".")
        if not leaf or isinstance(bank, Buffers):
            self._modules[key] = bank
            return
        container: Any = self._modules.setdefault(head, nn.ModuleDict())
        if name not in container:
            container[name] = Weights()
        container[name].register_parameter(leaf, bank[name])

    def _hold(self, name: str, adapter: Adapter) -> None:
        adapter.context, adapter.training = self.context, self.training
        self.adapters[name] = adapter

    def follow(self, name: str, adapter: Adapter, leader: TensorHolder) -> None:
        """Give the layer an adapter whose tensors are those of another layer: the two share their weight."""
        names = {slot.head.partition(".")[0] for slot, _ in leader.own_tensors(name)}
        heads = {head: leader._modules[head] for head in names}
        self._hold(name, adapter)
        self._slots[name], self._leaders[name] = [], leader
        self._shared[name] = heads
        self._modules.update(heads)

    def _place(self, name: str, slot: Slot, tensor: Tensor) -> None:
        """Register a tensor under PEFT's live name: `lora_A.<name>.weight` for `lora_A.weight`, else `ia3_l.<name>`."""
        above, last = self._above(slot.head)
        if last not in above:
            kind = nn.ModuleDict if slot.leaf else nn.ParameterDict if slot.spec.trainable else Buffers
            above[last] = kind()
        container: Any = above[last]
        leaf = name
        if slot.leaf:
            if name not in container:
                container[name] = Weights()
            container = container[name]
            *parents, leaf = slot.leaf.split(".")
            for parent in parents:  # `0.weight` of a list of layers
                if parent not in container._modules:
                    container.add_module(parent, Weights())
                container = container._modules[parent]
        owned = isinstance(tensor, nn.Parameter)
        value = nn.Parameter(tensor) if slot.spec.trainable and not owned else tensor
        if not slot.leaf:
            container[leaf] = value
        elif isinstance(value, nn.Parameter):
            container.register_parameter(leaf, value)
        else:
            container.register_buffer(leaf, value)

    def _above(self, head: str) -> tuple[dict[str, Any], str]:
        """The children among which a slot's container is, and its name there; modules on the way are made."""
        children: dict[str, Any] = self._modules  # add_module would see the inner layer's through __getattr__
        *path, last = head.split(".")
        for part in path:
            children = children.setdefault(part, nn.Module())._modules
        return children, last

    def own_tensors(self, name: str) -> Iterator[tuple[Slot, Tensor]]:
        """One adapter's tensors with their places, without the shared ones."""
        for slot in self._slots[name]:
            above, last = self._above(slot.head)
            held: Any = above[last]
            yield slot, attrgetter(slot.leaf)(held[name]) if slot.leaf else held[name]

    def tensors(self, name: str) -> Tensors:
        """One adapter's tensors as its equation wants them."""
        if name in self._leaders:
            return self._leaders[name].tensors(name)
        shared = {key: bank[name] for key, bank in self._shared[name].items()}
        return Tensors({slot.key: tensor for slot, tensor in self.own_tensors(name)} | shared)

    def remove(self, name: str) -> None:
        """Forget an adapter and its tensors; empty containers go too."""
        parted = {
            head
            for head, _, leaf in (key.partition(".") for key in self._shared[name] if key not in self._modules)
            if leaf
        }
        for head in parted | {slot.head for slot in self._slots[name]}:
            above, last = self._above(head)
            del above[last][name]
            if not len(above[last]):
                del above[last]
            if not above and above is not self._modules:
                del self._modules[head.partition(".")[0]]
        for key in self._shared.pop(name):
            if not any(key in keys for keys in self._shared.values()):
                self._modules.pop(key, None)
        del self.adapters[name], self._slots[name]
        self._leaders.pop(name, None)
        if name in self.active_adapters:
            self.active_adapters.remove(name)
