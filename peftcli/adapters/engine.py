"""Attach adapters to a model, switch, merge and remove them. Works on any nn.Module, wrapped in a PeftModel or not.

All that is known about a model's adapters is one `Attached` object, kept on the model. It changes the model in place:
adapted modules are replaced by `AdapterLayer`s, modules trained in full by `CopyLayer`s.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch  # noqa: TID253
from torch import nn  # noqa: TID253

from peftcli.adapters.base import Adapter, Tensors, fill
from peftcli.adapters.config import PeftConfig, TunerConfig, as_tuner_config
from peftcli.adapters.context import ForwardContext
from peftcli.adapters.copies import CopyLayer, TrainedBiases, trained_bias_owners
from peftcli.adapters.layer import AdapterLayer, Buffers, layer_for
from peftcli.adapters.registry import adapter_class
from peftcli.adapters.sites import LinearSite, Site, TransposedSite, site_for
from peftcli.adapters.targets import default_targets, matches, select, unmatched_targets
from peftcli.errors import InputError

STATE = "_peftcli_attached"


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
    """

    root: nn.Module
    configs: dict[str, PeftConfig] = field(default_factory=dict)
    context: ForwardContext = field(default_factory=ForwardContext)
    biases: dict[str, TrainedBiases] = field(default_factory=dict)
    shared: dict[str, nn.ParameterDict | Buffers] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    disabled: bool = False

    def layers(self) -> Iterator[tuple[str, AdapterLayer]]:
        """(path in the model, layer) of every adapted module."""
        return ((path, m) for path, m in self.root.named_modules() if isinstance(m, AdapterLayer))

    def copies(self) -> Iterator[tuple[str, CopyLayer]]:
        """(path in the model, layer) of every module trained in full."""
        return ((path, m) for path, m in self.root.named_modules() if isinstance(m, CopyLayer))

    @property
    def merged(self) -> bool:
        return any(layer.merged for _, layer in self.layers())

    # -- switching ------------------------------------------------------------------------------------------------

    def set_active(self, names: list[str], *, trainable: bool = True) -> None:
        """Make `names` the active adapters: only their tensors get gradients, unless `trainable` is False."""
        for name in names:
            self._known(name)
        if self.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
            self.unmerge()
        self.active = list(names)
        for _, layer in self.layers():
            layer.active_adapters = [name for name in names if name in layer.adapters]
        for _, copied in self.copies():
            copied.active_adapters = [name for name in names if name in copied.copies]
        for name in self.configs:
            frozen = self.configs[name].inference_mode
            self.set_requires_grad(name, trainable and name in names and not frozen)
        self._switch_biases()

    def enable(self, on: bool) -> None:
        """Switch all adapters on or off."""
        self.disabled = not on
        for _, layer in self.layers():
            layer.disable_adapters = not on
        for _, copied in self.copies():
            copied.disable_adapters = not on
        self._switch_biases()

    def _switch_biases(self) -> None:
        for name, biases in self.biases.items():
            if name not in self.active or self.disabled:
                biases.switch(False)
        for name in self.active:
            if name in self.biases and not self.disabled:
                self.biases[name].switch(True)

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
        for bank in self.shared.values():
            if isinstance(bank, nn.ParameterDict) and name in bank:
                yield bank[name]

    # -- merging --------------------------------------------------------------------------------------------------

    def merge(self, names: list[str] | None = None, *, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights in place; `unmerge` brings the originals back bit for bit."""
        if names is not None and not isinstance(names, list):
            raise InputError(f"adapter_names should be a list of strings, got {names!r}.")
        for name in names or []:
            self._known(name)
        merged = {name for _, layer in self.layers() for name in layer.merged_adapters}
        if merged and not set(names or self.active) - merged:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
            return
        for _, layer in self.layers():
            layer.merge(names, safe_merge=safe_merge)

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        for _, layer in self.layers():
            layer.unmerge()

    def unload(self, *, merge: bool, names: list[str] | None = None, safe_merge: bool = False) -> nn.Module:
        """The user's model without adapters: merged in, or as it was.

        A merged weight is a new parameter, so a tie to another module (input and output embeddings) is broken where the
        adapter changed one of the two; the model's config is told, so that a reload does not tie them again.
        """
        for _, layer in list(self.layers()):
            if merge:
                layer.merge(names, safe_merge=safe_merge)
                layer.forget_originals()
            elif layer.merged:
                layer.unmerge()
        for name, biases in self.biases.items():
            biases.switch(merge and name in (names or self.active))
        for path, copied in list(self.copies()):
            _put(self.root, path, copied.active if merge else copied.original)
        for path, layer in reversed(list(self.layers())):  # inner layers first: paths of outer ones stay true
            _put(self.root, path, layer.base_layer)
        if merge:
            _declare_untied(self.root)
        self.root.__dict__.pop(STATE, None)
        self.root.requires_grad_(False)
        return self.root

    # -- removing -------------------------------------------------------------------------------------------------

    def delete(self, name: str) -> None:
        """Remove an adapter without a trace. If it was active, the next one (by name) takes its place."""
        self._known(name)
        if self.merged:
            self.unmerge()
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
        del self.configs[name]
        if name in self.active:
            left = [other for other in self.active if other != name] or sorted(self.configs)[:1]
            if left and left != self.active:
                warnings.warn(
                    f"Adapter {name} was active which is now deleted. Setting active adapter to {left[0]}.",
                    stacklevel=3,
                )
            self.set_active(left)

    def _known(self, name: str) -> None:
        if name not in self.configs:
            raise InputError(f"Adapter {name} not found.", allowed=", ".join(self.configs))


def attached_to(model: nn.Module) -> Attached | None:
    """What is attached to a model, or None."""
    return model.__dict__.get(STATE)


def attach(
    model: nn.Module,
    config: PeftConfig,
    name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    initialize: bool = True,
) -> Attached:
    """Attach a new adapter in place and make it the active one.

    Args:
        model: any module; it is frozen but for the adapter.
        config: the adapter's config. What it leaves open (targets, fan_in_fan_out) is filled in from the model.
        name: the adapter's name; no dots, since it becomes part of parameter names.
        autocast_adapter_dtype: keep adapters of fp16 and bf16 models in fp32.
        initialize: False leaves the tensors empty, for an adapter that is loaded next.

    Raises:
        InputError: if the config does not fit the model; the model is then left as it was.
    """
    config = as_tuner_config(config)
    config.validate()
    attached = attached_to(model) or Attached(model)
    _check_new(attached, config, name)
    sites = plan_sites(model, config)
    copies = _modules_to_copy(model, config, sites)
    first = not attached.configs
    if first:
        model.requires_grad_(False)
        model.__dict__[STATE] = attached
    attached.configs[name] = config
    options = _Placement(autocast_adapter_dtype, initialize)
    _share(attached, name, sites, options)
    for site, adapter in sites:
        _attach_site(attached, name, site, adapter, options)
    for path in copies:
        _attach_copy(attached, name, path, options)
    mode = getattr(config, "bias", "none")
    if mode != "none":
        adapted = {layer.base_layer for _, layer in attached.layers() if name in layer.adapters}
        attached.biases[name] = TrainedBiases(trained_bias_owners(base_modules(model), mode, adapted))
    attached.set_active(attached.active if not first else [name], trainable=True)
    return attached


@dataclass(frozen=True)
class _Placement:
    """Where and in what precision new tensors are made."""

    autocast: bool
    initialize: bool

    def dtype(self, base: torch.dtype) -> torch.dtype:
        if not base.is_floating_point:
            return torch.float32
        half = base in (torch.float16, torch.bfloat16) or base.itemsize == 1
        return torch.float32 if half and self.autocast else base


def plan_sites(model: nn.Module, config: TunerConfig) -> list[tuple[Site, Adapter]]:
    """The sites a config adapts and the adapter of each, before anything is changed."""
    base = dict(base_modules(model))
    if config.target_modules is None:
        _fill_default_targets(model, config)
    linear = [path for path, module in base.items() if _is_linear(model, path, module)]
    chosen = select(config, base, linear=linear)
    for missing in unmatched_targets(config, chosen):
        warnings.warn(f"target_modules: `{missing}` matches no module of the model", stacklevel=4)
    method = adapter_class(config)
    planned: list[tuple[Site, Adapter]] = []
    for path in chosen:
        if any(path.startswith(f"{site.name}.") for site, _ in planned):
            continue  # inside a module that is adapted already
        site = site_for(base[path], path)
        if site is None or site.kind not in method.kinds:
            raise InputError(
                f"Target module {type(base[path]).__name__} is not supported by {config.peft_type}",
                place=path,
                field="target_modules",
                allowed=", ".join(sorted(method.kinds)),
            )
        _settle_fan_in_fan_out(config, site)
        planned.append((site, method(config, site.shape, site.weight)))
        if site.kind == "attention":
            out = LinearSite(base[f"{path}.out_proj"], f"{path}.out_proj")
            planned.append((out, method(config, out.shape, out.weight)))
    return planned


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


def _is_linear(model: nn.Module, path: str, module: nn.Module) -> bool:
    """What `all-linear` means: every linear layer but the output head."""
    site = site_for(module, path)
    if not isinstance(site, (LinearSite, TransposedSite)):
        return False
    head = embeddings(model)[1]
    is_head = head is not None and (module is head or getattr(head, "base_layer", None) is module)
    is_classifier = path in ("score", "classifier") and "Classification" in type(model).__name__
    return not is_head and not is_classifier


def embeddings(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """The input and output embeddings of a transformers model, as they stand now."""
    tokens = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return tokens, head


def _fill_default_targets(model: nn.Module, config: TunerConfig) -> None:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    targets = default_targets(config.peft_type, model_type)
    if targets is None:
        raise InputError(
            "Please specify `target_modules` in `peft_config`",
            field="target_modules",
            fix=f"there is no usual choice for model type {model_type!r}; `all-linear` adapts every linear layer",
        )
    config.target_modules = targets if isinstance(targets, str) else set(targets)


def _settle_fan_in_fan_out(config: TunerConfig, site: Site) -> None:
    """The module decides how its weight is stored; a config that says otherwise is corrected with PEFT's warning."""
    if not hasattr(config, "fan_in_fan_out") or not isinstance(site, LinearSite):
        return
    stored_transposed = isinstance(site, TransposedSite)
    if config.fan_in_fan_out != stored_transposed:
        kind = type(site.module).__name__
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is `{kind}`. "
            f"Setting fan_in_fan_out to {stored_transposed}.",
            stacklevel=5,
        )
        config.fan_in_fan_out = stored_transposed


def _modules_to_copy(model: nn.Module, config: TunerConfig, sites: list[tuple[Site, Adapter]]) -> list[str]:
    names = config.modules_to_save
    if not names:
        return []
    paths = [path for path, _ in base_modules(model) if path and matches(list(names), path, field="modules_to_save")]
    unmatched = [name for name in names if not any(path == name or path.endswith(f".{name}") for path in paths)]
    heads = ("classifier", "score", "qa_outputs")  # task types add all of them; a model has one
    if missing := [name for name in unmatched if name not in heads]:
        raise InputError(f"{missing} name no module of the model", field="modules_to_save")
    adapted = {site.name for site, _ in sites}
    if both := sorted(adapted & set(paths)):
        raise InputError(
            f"{both[0]} is adapted and also trained in full", field="modules_to_save", fix="name it in one"
        )
    return [path for path in paths if not any(path.startswith(f"{outer}.") for outer in paths)]


def _check_new(attached: Attached, config: TunerConfig, name: str) -> None:
    if "." in name or name == "":
        raise InputError(f"adapter name {name!r} may not contain a dot or be empty", field="adapter_name")
    if name in attached.configs:
        raise InputError(f"Adapter with name {name} already exists.", field="adapter_name")
    if attached.merged:
        raise InputError("Cannot add an adapter while others are merged", fix="unmerge_adapter() first")
    biased = [other for other in attached.configs.values() if getattr(other, "bias", "none") != "none"]
    if attached.configs and (biased or getattr(config, "bias", "none") != "none"):
        raise InputError(
            f"{type(config).__name__.removesuffix('Config')}Model supports only 1 adapter with bias. "
            "When using multiple adapters, set bias to 'none' for all adapters.",
            field="bias",
        )


def _share(attached: Attached, name: str, sites: list[tuple[Site, Adapter]], options: _Placement) -> None:
    """Allocate the tensors kept once a model; every site sees the same ones."""
    specs = {key: spec for _, adapter in sites for key, spec in adapter.tensors().items() if spec.shared}
    if not specs:
        return
    site, adapter = sites[0]
    made = type(adapter).make_shared([adapter for _, adapter in sites], attached.configs[name])
    for key, spec in specs.items():
        tensor = made.get(key)
        if tensor is None:
            tensor = torch.empty(spec.shape, device=site.device)
            fill(tensor, spec.init)
        bank = attached.shared.setdefault(key, nn.ParameterDict() if spec.trainable else Buffers())
        bank[name] = nn.Parameter(tensor.to(site.device)) if spec.trainable else tensor.to(site.device)


def _attach_site(attached: Attached, name: str, site: Site, adapter: Adapter, options: _Placement) -> None:
    existing = _find(attached.root, site.name)
    if isinstance(existing, AdapterLayer):
        layer = existing
    else:
        read = (
            isinstance(site, LinearSite) and site.name.endswith("out_proj") and _inside_attention(attached, site.name)
        )
        layer = layer_for(site, attached.context, weight_is_read=read)
        _replace(attached.root, site.name, layer)
    shared = Tensors({key: bank[name] for key, bank in attached.shared.items() if name in bank})
    layer.add(
        name,
        adapter,
        shared=shared,
        dtype=options.dtype(site.dtype),
        device=site.device,
        initialize=options.initialize,
    )


def _inside_attention(attached: Attached, path: str) -> bool:
    parent = _find(attached.root, path.rpartition(".")[0])
    return isinstance(getattr(parent, "base_layer", parent), nn.MultiheadAttention)


def _attach_copy(
    attached: Attached, name: str, path: str, options: _Placement, kind: type[CopyLayer] = CopyLayer
) -> None:
    existing = _find(attached.root, path)
    copied = existing if isinstance(existing, kind) else kind(existing, attached.context)
    if copied is not existing:
        _replace(attached.root, path, copied)
    dtype = next((p.dtype for p in copied.original.parameters() if p.is_floating_point()), torch.float32)
    copied.add(name, dtype=options.dtype(dtype))


def _find(root: nn.Module, path: str) -> nn.Module:
    """The module at a base path, looking through the layers that wrap its parents (not the module itself)."""
    module = root
    for part in path.split("."):
        while isinstance(module, (AdapterLayer, CopyLayer)):
            module = module.base_layer if isinstance(module, AdapterLayer) else module.original
        module = module.get_submodule(part)
    return module


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a base path, reaching through whatever wraps its parents."""
    parent, _, leaf = path.rpartition(".")
    owner = _find(root, parent) if parent else root
    while isinstance(owner, (AdapterLayer, CopyLayer)):
        owner = owner.base_layer if isinstance(owner, AdapterLayer) else owner.original
    owner.add_module(leaf, module)


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
