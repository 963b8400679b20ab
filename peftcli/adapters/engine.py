"""`Attached`: the adapters of one model. Switching, merging and removing them; `attach.py` puts them there.

Works on any nn.Module, wrapped in a PeftModel or not: all that is known is one object kept on the model itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from torch import nn  # noqa: TID253

from peftcli.adapters.base import Adapter, Tensors
from peftcli.adapters.config import PeftConfig
from peftcli.adapters.context import ForwardContext
from peftcli.adapters.copies import CopyLayer, TrainedBiases
from peftcli.adapters.fingerprint import fingerprint
from peftcli.adapters.holding import Buffers
from peftcli.adapters.layer import AdapterLayer
from peftcli.errors import ArgumentTypeError, InputError

STATE = "_peftcli_attached"


class Removable(Protocol):
    """Something done to the model that can be undone."""

    def remove(self) -> None: ...


def nothing_to_undo() -> None:
    """The model's layers are its own."""


@dataclass
class Attached:
    """The adapters of one model.

    Attributes:
        root: the user's model.
        configs: by adapter name.
        context: facts about the running batch.
        biases: trained biases by adapter name.
        shared: tensors kept once a model (VeRA's projections), by tensor name then adapter name.
        active: the active adapters, first named outermost.
        disabled: whether all adapters are switched off.
        undo_surgery: brings the model's own layers back where they were replicated.
        asleep: what was trained when the layers were disabled.
        prompts: what stands in front of the model's inputs, by adapter name.
        gates: what weighs other adapters, its experts, by its own adapter name.
        hooks: on the modules whose inputs a prompt or gate changes.
        base: the fingerprint of the model as it was before its first adapter.
    """

    root: nn.Module
    configs: dict[str, PeftConfig] = field(default_factory=dict)
    context: ForwardContext = field(default_factory=ForwardContext)
    biases: dict[str, TrainedBiases] = field(default_factory=dict)
    shared: dict[str, nn.ParameterDict | Buffers] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    disabled: bool = False
    undo_surgery: Callable[[], None] = nothing_to_undo
    asleep: list[nn.Parameter] = field(default_factory=list)
    prompts: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    gates: dict[str, Any] = field(default_factory=dict)
    hooks: list[Removable] = field(default_factory=list)
    base: dict[str, Any] | None = field(init=False)

    def __post_init__(self) -> None:
        self.base = fingerprint(self.root)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(path in the model, module) but for what holds the adapters' tensors at adapted modules."""
        return _walk(self.root)

    def layers(self) -> Iterator[tuple[str, AdapterLayer]]:
        """(path in the model, layer) of every adapted module."""
        return ((path, m) for path, m in _walk(self.root) if isinstance(m, AdapterLayer))

    def copies(self) -> Iterator[tuple[str, CopyLayer]]:
        """(path in the model, layer) of every module trained in full."""
        return ((path, m) for path, m in _walk(self.root) if isinstance(m, CopyLayer))

    def named_parts(self) -> Iterator[tuple[str, AdapterLayer | CopyLayer]]:
        """(path in the model, layer) of everything that stands in a module's place."""
        return ((path, m) for path, m in _walk(self.root) if isinstance(m, (AdapterLayer, CopyLayer)))

    def parts(self) -> Iterator[AdapterLayer | CopyLayer]:
        """Everything that stands in a module's place."""
        return (part for _, part in self.named_parts())

    def members(self, name: str) -> list[str]:
        """The names an adapter has in the layers: its own, or those of a gate's experts."""
        return self.gates[name].experts if name in self.gates else [name]

    def own_configs(self) -> dict[str, PeftConfig]:
        """Configs without those of experts, which belong to their gate."""
        experts = {expert for gate in self.gates.values() for expert in gate.experts}
        return {name: config for name, config in self.configs.items() if name not in experts}

    def sites(self, name: str) -> list[tuple[Adapter, Tensors]]:
        """One adapter at every module it adapts, with its tensors there."""
        return [(layer.adapters[name], layer.tensors(name)) for _, layer in self.layers() if name in layer.adapters]

    @property
    def prompt(self) -> Any:
        """The prompt that stands in front of the inputs now (a `PromptEncoder`), or None."""
        return None if self.disabled or not self.active else self.prompt_of(self.active[0])

    def prompt_of(self, name: str) -> Any:
        """One adapter's prompt (a `PromptEncoder`), or None."""
        return dict(self.prompts.items()).get(name)

    @property
    def key_prefix(self) -> str:
        """What the file's keys put in front of a path in the user's model: with prompts, PEFT wraps it once only."""
        return "base_model." if len(self.prompts) else "base_model.model."

    @property
    def merged(self) -> bool:
        return any(layer.merged_adapters for layer in self.parts())

    # -- switching ------------------------------------------------------------------------------------------------

    def set_active(self, names: list[str], *, trainable: bool = True) -> None:
        """Make `names` the active adapters: only their tensors get gradients, unless `trainable` is False."""
        for name in names:
            self._known(name)
        for path, copied in self.copies():
            copied.check_active(names, path)
        if len(names) > 1 and len(self.prompts):
            raise InputError("one prompt at a time can be active", field="adapter_name")
        self.unmerge_to_switch()
        self.active = list(names)
        inside = self.tell_layers()
        for name in self.configs:
            expert = name in inside and not self.configs[name].inference_mode
            self.set_requires_grad(name, trainable and (name in names or expert))
        self._switch_biases()

    def tell_layers(self) -> list[str]:
        """Tell every layer which adapters are active, also one that has none of them. Returns their names in the layers."""
        inside = [member for name in self.active for member in self.members(name)]
        for layer in self.parts():
            layer.active_adapters, layer.disable_adapters = list(inside), self.disabled
        return inside

    def enable(self, on: bool) -> None:
        """Switch all adapters on or off."""
        if not on and self.biases and self.merged:
            self.unmerge()  # a merged bias stands where the trained one is switched
        self.disabled = not on
        for layer in self.parts():
            layer.disable_adapters = not on
        self._switch_biases()

    def _switch_biases(self) -> None:
        for name, biases in self.biases.items():
            if name not in self.active or self.disabled:
                biases.switch(False)
        for name in self.active:
            if name in self.biases and not self.disabled:
                self.biases[name].switch(True)

    def sleep(self) -> None:
        """Switch all adapters off until `wake`, and their gradients with them."""
        if not self.disabled:
            self.asleep = [p for name in self.configs for p in self.parameters_of(name) if p.requires_grad]
            for parameter in self.asleep:
                parameter.requires_grad_(False)
        self.enable(False)

    def wake(self) -> None:
        """Switch adapters on again; what was trained is trained again. (PEFT also unfreezes active ones that were frozen.)"""
        for parameter in self.asleep:
            parameter.requires_grad_(True)
        self.asleep = []
        self.enable(True)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """The bare base model, for a while. May be nested."""
        before = self.disabled
        self.enable(False)
        try:
            yield
        finally:
            self.enable(not before)

    def set_requires_grad(self, name: str, on: bool) -> None:
        """Train an adapter, or no longer."""
        self._known(name)
        for parameter in self.parameters_of(name):
            parameter.requires_grad_(on)

    def parameters_of(self, name: str) -> Iterator[nn.Parameter]:
        """Everything one adapter trains."""
        for _, layer in self.layers():
            if name in layer.adapters:
                yield from (cast(nn.Parameter, t) for slot, t in layer.own_tensors(name) if slot.spec.trainable)
        for _, copied in self.copies():
            if name in copied.copies:
                yield from copied.copies[name].parameters()
        if name in self.biases:
            yield from self.biases[name].trained
        if name in self.prompts:
            yield from self.prompts[name].parameters()
        if name in self.gates:
            yield from self.gates[name].parameters()
        for bank in self.shared.values():
            if isinstance(bank, nn.ParameterDict) and name in bank:
                yield bank[name]

    # -- merging --------------------------------------------------------------------------------------------------

    def merge(self, names: list[str] | None = None, *, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights in place; `unmerge` brings the originals back bit for bit."""
        names = self._to_merge(names)
        merged = sorted({name for layer in self.parts() for name in layer.merged_adapters})
        if merged and not (more := set(names) - set(merged)):
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
            return
        if merged:
            warnings.warn(
                f"Already following adapters were merged {','.join(merged)}. "
                f"You are now additionally merging {','.join(sorted(more))}.",
                stacklevel=3,
            )
        for _, layer in self.layers():
            layer.merge(safe_merge, names)
        for _, copied in self.copies():
            copied.merge(names)

    def _to_merge(self, names: list[str] | None) -> list[str]:
        """The adapters to merge: those named, or the active ones."""
        if names is not None and not isinstance(names, list):
            raise ArgumentTypeError(f"adapter_names should be a list of strings, got {names!r}.")
        for name in names or []:
            self._known(name)
        self._require_mergeable()
        return self.active if names is None else names

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        for layer in self.parts():
            layer.unmerge()

    def unmerge_to_switch(self) -> None:
        """Unmerge, with PEFT's warning, before adapters are switched or added."""
        if self.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=4)
            self.unmerge()

    def unload(self, *, merge: bool, names: list[str] | None = None, safe_merge: bool = False) -> nn.Module:
        """The user's model without adapters: merged in, or as it was.

        A merged weight is a new parameter, so a tie to another module (input and output embeddings) is broken where the
        adapter changed one of the two; the model's config is told, so that a reload does not tie them again.
        """
        names = self._to_merge(names) if merge else []
        if not merge and self.merged:
            self.unmerge()
        for name, biases in self.biases.items():  # before merging: a method may change the bias as well
            biases.switch(name in names)
        for _, layer in list(self.layers()) if merge else []:
            layer.merge(safe_merge, names)
            layer.forget_originals()  # one layer's at a time: a large base must not be held twice
        for path, copied in list(self.copies()):
            copied.merge(names)
            _put(self.root, path, copied.final() if merge else copied.original)
        for path, layer in reversed(list(self.layers())):  # inner layers first: paths of outer ones stay true
            _put(self.root, path, layer.base_layer)
        if merge:
            _declare_untied(self.root)
        self.undo_surgery()
        self.prompts.clear()
        self.gates.clear()
        self._unhook()
        for name in (STATE, "peft_config"):
            self.root.__dict__.pop(name, None)
        self.root.requires_grad_(False)
        return self.root

    # -- removing -------------------------------------------------------------------------------------------------

    def delete(self, name: str) -> None:
        """Remove an adapter without a trace. If it was active, the next one (by name) takes its place."""
        if name not in self.configs:
            raise InputError(f"Adapter {name} does not exist", allowed=", ".join(self.configs))
        if name not in self.own_configs():
            raise InputError(f"Adapter {name} is an expert: its gate needs it", fix="delete the gate")
        members = self.members(name)
        if merged := sorted({held for part in self.parts() for held in part.merged_adapters} & set(members)):
            raise InputError(f"Cannot delete adapter(s) {merged} while they are merged. Please unmerge them first.")
        for member in members:
            self._drop(member)
        if name in self.gates:
            del self.gates[name], self.configs[name]
            self.context.gate_scalings = None
            self._unhook()
        if name not in self.active:
            return
        left = [other for other in self.active if other != name]
        if not left and self.configs:
            left = [min(self.configs)]
            warnings.warn(
                f"Adapter {name} was active which is now deleted. Setting active adapter to {left[0]}.", stacklevel=3
            )
        self.set_active(left)

    def _drop(self, name: str) -> None:
        """Take what an adapter has in the layers out of the model."""
        if name in self.biases:
            self.biases.pop(name).switch(False)
        for path, layer in reversed(list(self.layers())):
            if name in layer.adapters:
                layer.remove(name)
                if not layer.adapters:
                    _put(self.root, path, layer.base_layer)
        for path, copied in list(self.copies()):
            if name in copied.copies:
                copied.remove(name)
                if not len(copied.copies):
                    _put(self.root, path, copied.original)
        for bank in self.shared.values():
            if name in bank:
                del bank[name]
        if name in self.prompts:
            del self.prompts[name]
            if not len(self.prompts):
                self._unhook()
        del self.configs[name]

    def _unhook(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()

    def _require_mergeable(self) -> None:
        if self.gates:
            raise InputError("XLORA adapters cannot be merged: the gate weighs its experts anew for each token")
        if len(self.prompts):
            method = next(iter(self.configs.values())).peft_type
            raise InputError(f"{method} adapters cannot be merged: a prompt is no weight of the model")

    def _known(self, name: str) -> None:
        if name not in self.configs:
            raise InputError(f"Adapter {name} not found.", allowed=", ".join(self.configs))


def attached_to(model: nn.Module) -> Attached | None:
    """What is attached to a model, or None."""
    return model.__dict__.get(STATE)


def user_model(model: Any) -> nn.Module:
    """The user's model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapters_of(model: nn.Module) -> Attached:
    """What is attached to a model or to the one inside a PeftModel.

    Raises:
        InputError: if nothing is.
    """
    attached = attached_to(user_model(model))
    if attached is None:
        raise InputError("the model has no adapters")
    return attached


def _walk(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` but for the adapters' tensors: its time does not grow with the number of adapters."""
    waiting, seen = [("", root)], set()
    while waiting:
        path, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        inside = [("base_layer", module.base_layer)] if isinstance(module, AdapterLayer) else module.named_children()
        waiting += reversed([(f"{path}.{name}" if path else name, child) for name, child in inside])


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The base model's modules under their original paths, whatever already wraps them."""

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(module, AdapterLayer):
            yield from walk(module.base_layer, path)
        elif isinstance(module, CopyLayer):
            yield from walk(module.original, path)
        else:
            yield path, module
            for name, child in module.named_children():
                yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, "")


def embeddings(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """The input and output embeddings of a transformers model, as they stand now."""
    return _embedding(model, "get_input_embeddings"), _embedding(model, "get_output_embeddings")


def _embedding(model: Any, getter: str) -> nn.Module | None:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # not a transformers model, or one without tokens
        return None


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a path as `named_modules` tells it now."""
    parent, _, leaf = path.rpartition(".")
    root.get_submodule(parent).add_module(leaf, module)


def _declare_untied(model: nn.Module) -> None:
    """Tell the config when input and output embeddings no longer share their weight."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    tokens, head = embeddings(model)
    if head is not None and tokens is not None and head.weight is not tokens.weight:
        cast(Any, config).tie_word_embeddings = False
