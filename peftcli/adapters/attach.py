"""Attach an adapter to a model: carry out a plan (`planning.py`) and put the layers in their places.

The model is changed in place: adapted modules are replaced by `AdapterLayer`s, modules trained in full by `CopyLayer`s.
All sites are planned before the first is touched, so a config that does not fit leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch  # noqa: TID253
from torch import nn  # noqa: TID253

from peftcli.adapters.base import Adapter, CopyNames, fill
from peftcli.adapters.config import PeftConfig, TunerConfig, as_tuner_config
from peftcli.adapters.copies import CopyLayer, TrainedBiases, trained_bias_owners
from peftcli.adapters.engine import STATE, Attached, attached_to, base_modules
from peftcli.adapters.holding import Buffers
from peftcli.adapters.layer import AdapterLayer, layer_for
from peftcli.adapters.planning import plan_copies, plan_sites
from peftcli.adapters.sites import LinearSite, ParameterSite, Site
from peftcli.adapters.surgery import replicate_layers
from peftcli.adapters.ties import followers
from peftcli.errors import InputError


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
    config.check()
    attached = attached_to(model) or Attached(model)
    check_new(attached, config, name)
    attached.unmerge_to_switch()
    undo = _replicate(attached, config)
    try:
        sites = plan_sites(model, config)
        tied = followers(dict(base_modules(model)), sites)
        copies = plan_copies(model, config, sites)
    except InputError:
        undo()
        raise
    attached.undo_surgery = undo
    first = not attached.configs
    if first:
        model.requires_grad_(False)
        model.__dict__[STATE] = attached
        model.__dict__["peft_config"] = attached.configs  # PEFT's name, for a model that no PeftModel wraps
    attached.configs[name] = config
    options = Placement(autocast_adapter_dtype, initialize)
    _share(attached, name, sites, options)
    for site, adapter in sites:
        _attach_site(attached, name, site, adapter, options)
    for site, adapter, leader in tied:
        _layer_at(attached, site).follow(name, adapter, _layer_at(attached, leader))
    for path, names in copies.items():
        attach_copy(attached, name, path, names, options)
    mode = getattr(config, "bias", "none")
    if mode != "none":
        adapted = {layer.base_layer for _, layer in attached.layers() if name in layer.adapters}
        attached.biases[name] = TrainedBiases(trained_bias_owners(base_modules(model), mode, adapted))
    if first:
        attached.set_active([name], trainable=not config.inference_mode)
    else:
        attached.tell_layers()
        attached.set_requires_grad(name, False)  # it stands by; the active ones stay as they are
    return attached


def _replicate(attached: Attached, config: TunerConfig) -> Callable[[], None]:
    """Repeat layers where the config asks for it. Returns what undoes this and what was done before."""
    ranges = getattr(config, "layer_replication", None)
    if not ranges:
        return attached.undo_surgery
    if attached.configs:
        raise InputError("layers can be replicated by the first adapter only", field="layer_replication")
    return replicate_layers(attached.root, ranges)


@dataclass(frozen=True)
class Placement:
    """In what precision new tensors are made and whether they are filled."""

    autocast: bool = True
    initialize: bool = True

    def dtype(self, base: torch.dtype) -> torch.dtype:
        if not base.is_floating_point:
            return torch.float32
        half = base in (torch.float16, torch.bfloat16) or base.itemsize == 1
        return torch.float32 if half and self.autocast else base


def check_new(attached: Attached, config: PeftConfig, name: str) -> None:
    """Refuse a name that is taken or can't be one, and neighbours the adapter can't stand beside."""
    if "." in name or name == "":
        raise InputError(f"adapter name {name!r} may not contain a dot or be empty", field="adapter_name")
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise InputError(
            f"adapter name {name!r} is taken: torch's modules have an attribute of it", field="adapter_name"
        )
    if name in attached.configs:
        raise InputError(
            f"Adapter with name '{name}' already exists.",
            field="adapter_name",
            fix="another adapter_name, or delete_adapter or unload first",
        )
    config.check_beside(list(attached.configs.values()))
    if attached.configs and getattr(config, "bias", "none") != "none":
        raise InputError(
            f"{type(config).__name__.removesuffix('Config')}Model supports only 1 adapter with bias. "
            "When using multiple adapters, set bias to 'none' for all adapters.",
            field="bias",
        )


def _share(attached: Attached, name: str, sites: list[tuple[Site, Adapter]], options: Placement) -> None:
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
        tensor = tensor.to(site.device)
        bank[name] = nn.Parameter(tensor) if spec.trainable else _equal_tensor(bank, tensor)


def _equal_tensor(bank: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor another adapter already keeps, if it is the same (both made from one seed), else `tensor`."""
    if tensor.is_meta:
        return tensor
    same = (other for other in bank.buffers() if other.shape == tensor.shape and torch.equal(other, tensor))
    return next(same, tensor)


def _attach_site(attached: Attached, name: str, site: Site, adapter: Adapter, options: Placement) -> None:
    layer = _layer_at(attached, site)
    shared = {key: bank for key, bank in attached.shared.items() if name in bank}
    layer.add(
        name,
        adapter,
        shared=shared,
        dtype=options.dtype(site.dtype),
        device=site.device,
        initialize=options.initialize,
        layer_at=lambda path: cast(AdapterLayer, _find(attached.root, path)),
    )


def _layer_at(attached: Attached, site: Site) -> AdapterLayer:
    """The layer that adapts a site; made and put in its place where there is none."""
    top = inner = _find(attached.root, site.name)
    while isinstance(inner, AdapterLayer):
        if inner.site.parameter == site.parameter:
            return inner
        inner = inner.base_layer
    if isinstance(site, ParameterSite):
        site.wrap(top)
    read = isinstance(site, LinearSite) and site.name.endswith("out_proj") and _inside_attention(attached, site.name)
    layer = layer_for(site, attached.context, weight_is_read=read)
    layer.base_layer = top
    _replace(attached.root, site.name, layer)
    return layer


def _inside_attention(attached: Attached, path: str) -> bool:
    parent = _find(attached.root, path.rpartition(".")[0])
    return isinstance(getattr(parent, "base_layer", parent), nn.MultiheadAttention)


def attach_copy(attached: Attached, name: str, path: str, names: CopyNames, options: Placement) -> None:
    """Give an adapter a trained copy of the module at `path`."""
    existing = _find(attached.root, path)
    fitting = existing if isinstance(existing, CopyLayer) and existing.names == names else None
    copied = fitting or CopyLayer(existing, attached.context, names)
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
