"""Which modules of a model a config adapts, and with what: planned before anything is changed.

A plan asks the model for its modules and the config for their names; it fills in what the config leaves open (targets,
fan_in_fan_out) and refuses what does not fit. `attach.py` carries it out.
"""

from __future__ import annotations

import warnings

from torch import nn  # noqa: TID253

from peftcli.adapters.base import Adapter, CopyAdapter, CopyNames, DeltaAdapter
from peftcli.adapters.config import HEADS, INPUT_EMBEDDINGS, TunerConfig, as_set
from peftcli.adapters.copies import MODULES_TO_SAVE
from peftcli.adapters.engine import base_modules, embeddings
from peftcli.adapters.module_layer import ModuleSite
from peftcli.adapters.prompt_base import PromptLearningConfig
from peftcli.adapters.registry import adapter_class, adapter_class_of
from peftcli.adapters.sites import LinearSite, ParameterSite, Site, TransposedSite, site_for
from peftcli.adapters.targets import default_targets, matches, select, shortest_names, unmatched
from peftcli.errors import InputError, printable

TASK_HEADS = frozenset(head for heads in HEADS.values() for head in heads)


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
                f"Target module {_shown(base[path])} is not supported. {config.peft_type} adapts other kinds of modules",
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


def _shown(module: nn.Module) -> str:
    text = repr(module)
    return type(module).__name__ if "\n" in text else printable(text)


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
    given = config.target_modules
    _fill_defaults(model, config)
    linear = [path for path, module in base.items() if _is_linear(model, path, module)]
    chosen = select(config, base, linear=linear)
    if config.is_all_linear:
        config.target_modules = set(shortest_names(chosen, base))
    config.settle_targets(chosen)
    for field, missing in unmatched(config, base) if given is not None else ():
        warnings.warn(f"{field}: `{missing}` matches no module of the model", stacklevel=5)
    return chosen


def _is_linear(model: nn.Module, path: str, module: nn.Module) -> bool:
    """What `all-linear` means: every linear layer but the output head, be it of words, classes or positions."""
    site = site_for(module, path)
    if not isinstance(site, (LinearSite, TransposedSite)):
        return False
    head = embeddings(model)[1]
    is_head = head is not None and (module is head or getattr(head, "base_layer", None) is module)
    has_task_head = any(kind in type(model).__name__ for kind in ("Classification", "QuestionAnswering"))
    return not is_head and not (has_task_head and path.split(".")[0] in TASK_HEADS)


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
    """The modules whose path ends with an entry, letter by letter as in PEFT: `classifier` means `pre_classifier` as well."""
    names = config.modules_to_save
    if not names:
        return []
    paths = [path for path, _ in base_modules(model) if path.endswith(tuple(names))]
    unmatched = [name for name in names if not any(path.endswith(name) for path in paths)]
    # Task types add all heads there are; a model has one.
    heads = TASK_HEADS if config.task is None else HEADS.get(config.task, ())
    if missing := [name for name in unmatched if name not in heads]:
        raise InputError(f"{missing} name no module of the model", field="modules_to_save")
    return paths
