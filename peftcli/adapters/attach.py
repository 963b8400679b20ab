"""Attach an adapter to a model: find its sites, check that they fit, put the layers in their places.

The model is changed in place: adapted modules are replaced by `AdapterLayer`s, modules trained in full by `CopyLayer`s.
All sites are planned before the first is touched, so a config that does not fit leaves the model as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch  # noqa: TID253
from torch import nn  # noqa: TID253

from peftcli.adapters.base import Adapter, CopyAdapter, CopyNames, DeltaAdapter, fill
from peftcli.adapters.config import INPUT_EMBEDDINGS, PeftConfig, TunerConfig, as_set, as_tuner_config
from peftcli.adapters.copies import MODULES_TO_SAVE, CopyLayer, TrainedBiases, trained_bias_owners
from peftcli.adapters.engine import STATE, Attached, attached_to, base_modules, embeddings
from peftcli.adapters.layer import AdapterLayer, Buffers, layer_for
from peftcli.adapters.module_layer import ModuleSite
from peftcli.adapters.prompt_base import PromptLearningConfig
from peftcli.adapters.registry import adapter_class, adapter_class_of
from peftcli.adapters.sites import LinearSite, ParameterSite, Site, TransposedSite, site_for
from peftcli.adapters.surgery import replicate_layers
from peftcli.adapters.targets import default_targets, matches, select, unmatched_targets
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
    config.validate()
    attached = attached_to(model) or Attached(model)
    check_new(attached, config, name)
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
    attached.set_active(attached.active if not first else [name], trainable=True)
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


def plan_sites(model: nn.Module, config: TunerConfig) -> list[tuple[Site, Adapter]]:
    """The sites a config adapts and the adapter of each, before anything is changed."""
    method = adapter_class(config)
    if issubclass(method, CopyAdapter):
        return []
    base = dict(base_modules(model))
    planned: list[tuple[Site, Adapter]] = []
    for path in _targets(model, config, base):
        if any(path.startswith(f"{site.name}.") for site, _ in planned):
            continue  # inside a module that is adapted already
        site = ModuleSite(base[path], path) if "module" in method.kinds else site_for(base[path], path)
        if site is None or site.kind not in method.kinds:
            raise InputError(
                f"Target module {type(base[path]).__name__} is not supported by {config.peft_type}",
                place=path,
                field="target_modules",
                allowed=", ".join(sorted(method.kinds)),
            )
        _settle_fan_in_fan_out(config, site)
        planned.append((site, site.adapter(method, config)))
        if site.kind == "attention":
            out = LinearSite(base[f"{path}.out_proj"], f"{path}.out_proj")
            planned.append((out, out.adapter(method, config)))
    method.arrange([adapter for _, adapter in planned])
    planned += _parameter_sites(config, base)
    for companion in config.companions():
        companion.validate()
        planned += plan_sites(model, companion)
    names = [site.name for site, _ in planned if site.kind != "parameter"]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError("is adapted twice by one adapter", place=twice[0], field="target_modules")
    for site, adapter in planned:
        adapter.tensors()  # refuses settings that do not fit its module
        if site.kind == "attention" and isinstance(adapter, DeltaAdapter) and adapter.drops:
            raise InputError("nn.MultiheadAttention leaves no place for an adapter's dropout", place=site.name)
    return planned


def _parameter_sites(config: TunerConfig, base: dict[str, nn.Module]) -> list[tuple[Site, Adapter]]:
    """The parameters `target_parameters` names (LoRA only: weights that no linear layer holds)."""
    wanted = getattr(config, "target_parameters", None) or []
    found: dict[str, tuple[Site, Adapter]] = {}
    for path, module in base.items():
        for leaf, parameter in module._parameters.items():
            name = f"{path}.{leaf}" if path else leaf
            if parameter is None or not matches(list(wanted), name, field="target_parameters"):
                continue
            if parameter.dim() not in (2, 3):
                raise InputError(f"{parameter.dim()} dimensions; only 2 and 3 can be adapted", place=name)
            site = ParameterSite(module, path, leaf)
            method = adapter_class_of(config.parameter_method(site.shape.experts))
            found[name] = site, site.adapter(method, config)
    if missing := [key for key in wanted if not any(name == key or name.endswith(f".{key}") for name in found)]:
        raise InputError(f"{missing} name no parameter of the model", field="target_parameters")
    return list(found.values())


def plan_copies(
    model: nn.Module, config: TunerConfig | PromptLearningConfig, sites: list[tuple[Site, Adapter]]
) -> dict[str, CopyNames]:
    """The modules an adapter trains in full, by path: its `modules_to_save`, and what a copying method targets."""
    copies = dict.fromkeys(_modules_to_save(model, config), MODULES_TO_SAVE)
    adapted = [site.name for site, _ in sites]
    method = adapter_class(config)
    if isinstance(config, TunerConfig) and issubclass(method, CopyAdapter):
        adapted = _targets(model, config, dict(base_modules(model)))
    if both := sorted(set(adapted) & set(copies)):
        raise InputError(
            f"{both[0]} is adapted and also trained in full", field="modules_to_save", fix="name it in one"
        )
    if issubclass(method, CopyAdapter):
        copies |= dict.fromkeys(adapted, method.names)
    return {path: names for path, names in copies.items() if not any(path.startswith(f"{outer}.") for outer in copies)}


def _targets(model: nn.Module, config: TunerConfig, base: dict[str, nn.Module]) -> list[str]:
    """The modules `target_modules` means, with a warning for entries that mean none."""
    if not config.target_modules and getattr(config, "target_parameters", None):
        return []
    _fill_defaults(model, config)
    linear = [path for path, module in base.items() if _is_linear(model, path, module)]
    chosen = select(config, base, linear=linear)
    for missing in unmatched_targets(config, chosen):
        warnings.warn(f"target_modules: `{missing}` matches no module of the model", stacklevel=5)
    return chosen


def _is_linear(model: nn.Module, path: str, module: nn.Module) -> bool:
    """What `all-linear` means: every linear layer but the output head."""
    site = site_for(module, path)
    if not isinstance(site, (LinearSite, TransposedSite)):
        return False
    head = embeddings(model)[1]
    is_head = head is not None and (module is head or getattr(head, "base_layer", None) is module)
    is_classifier = path in ("score", "classifier") and "Classification" in type(model).__name__
    return not is_head and not is_classifier


def _fill_defaults(model: nn.Module, config: TunerConfig) -> None:
    """Set the module lists a config leaves open to the usual ones of the model's type."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    config.check_model_type(model_type)
    for name, table in config.default_tables.items():
        if getattr(config, name) is not None:
            continue
        by_table = default_targets(config.peft_type, model_type, table=table)
        usual = _input_embeddings(model) if table == INPUT_EMBEDDINGS else by_table
        if usual is None:
            raise InputError(
                f"Please specify `{name}` in `peft_config`",
                field=name,
                fix=f"there is no usual choice for model type {model_type!r}; `all-linear` adapts every linear layer"
                if name == "target_modules"
                else f"there is no usual choice for model type {model_type!r}; [] means none",
            )
        setattr(config, name, as_set(usual))


def _input_embeddings(model: nn.Module) -> list[str] | None:
    module = embeddings(model)[0]
    bare = getattr(module, "base_layer", module)
    return [path for path, candidate in base_modules(model) if candidate is bare][:1] or None


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


def _modules_to_save(model: nn.Module, config: TunerConfig | PromptLearningConfig) -> list[str]:
    names = config.modules_to_save
    if not names:
        return []
    paths = [path for path, _ in base_modules(model) if path and matches(list(names), path, field="modules_to_save")]
    unmatched = [name for name in names if not any(path == name or path.endswith(f".{name}") for path in paths)]
    heads = ("classifier", "score", "qa_outputs")  # task types add all of them; a model has one
    if missing := [name for name in unmatched if name not in heads]:
        raise InputError(f"{missing} name no module of the model", field="modules_to_save")
    return paths


def check_new(attached: Attached, config: PeftConfig, name: str) -> None:
    """Refuse a name that is taken or can't be one, and neighbours the adapter can't stand beside."""
    if "." in name or name == "":
        raise InputError(f"adapter name {name!r} may not contain a dot or be empty", field="adapter_name")
    if name in attached.configs:
        raise InputError(f"Adapter with name {name} already exists.", field="adapter_name")
    config.check_beside(list(attached.configs.values()))
    if attached.merged:
        raise InputError("Cannot add an adapter while others are merged", fix="unmerge_adapter() first")
    biased = [other for other in attached.configs.values() if getattr(other, "bias", "none") != "none"]
    if attached.configs and (biased or getattr(config, "bias", "none") != "none"):
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
