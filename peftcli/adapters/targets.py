"""Which modules a config means: names, expressions, layer numbers, `all-linear`, and the usual ones of a model type.

Works on names alone (no torch), so a plan, a file check and a live model ask the same code. Expressions come from files
that nobody vouches for: see `expressions.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from peftcli.adapters.expressions import fullmatch
from peftcli.errors import InputError, NoMatchingPeftModuleError, printable

if TYPE_CHECKING:
    from peftcli.adapters.config import PeftConfig, TunerConfig

Value = TypeVar("Value")

MAX_LISTED = 40
MIN_SHORTENED = 20
"""PEFT stores the names `all-linear` stands for in full below this number of them."""
MAX_EXPRESSIONS = 1000  # in one rank_pattern: each costs a match on every module
PLAIN_NAME = re.compile(r"[\w.]*")
DUMMY_TARGET_MODULES = "dummy-target-modules"
"""PEFT's word for an adapter that adapts nothing (it then only carries modules_to_save)."""
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
"""PEFT's name for the word."""


def matches(names: Iterable[str] | str, module: str, *, field: str) -> bool:
    """Whether `module` is meant: a list holds it or its ending after a dot; a string is an expression for all of it."""
    if isinstance(names, str):
        return fullmatch(names, module, field=field)
    parts = module.split(".")
    known = names if isinstance(names, (set, frozenset, dict)) else set(names)
    return any(".".join(parts[start:]) in known for start in range(len(parts)))


def pattern_value(pattern: Mapping[str, Value], module: str, default: Value, *, field: str = "rank_pattern") -> Value:
    """The value of the first key that names the module: by its ending, or as an expression for such an ending.

    Raises:
        InputError: if an expression is broken, too slow, or there are too many of them.
    """
    expressions = 0
    for key, value in pattern.items():
        if PLAIN_NAME.fullmatch(key):  # no need of the expressions' machinery: its dots are all there is to it
            if _fits_ending(key, module):
                return value
            continue
        expressions += 1
        if expressions > MAX_EXPRESSIONS:
            raise InputError(f"holds more than {MAX_EXPRESSIONS:,} expressions", field=field)
        if fullmatch(rf"(.*\.)?({key})", module, field=field):
            return value
    return default


def _fits_ending(key: str, module: str) -> bool:
    """Whether a key of letters, digits and dots matches the module's name or an ending of it; a dot is any character."""
    ending = module[len(module) - len(key) :] if 0 < len(key) <= len(module) else ""
    whole = len(key) == len(module) or (ending and module[-len(key) - 1] == ".")
    return bool(ending and whole) and all(sign in (".", found) for sign, found in zip(key, ending, strict=True))


def is_all_linear(targets: Any) -> bool:
    """Whether `target_modules` is the word for every linear layer but the output head."""
    return isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def select(config: TunerConfig, modules: Iterable[str], *, linear: Iterable[str] = ()) -> list[str]:
    """The modules a config adapts, in the model's order.

    Args:
        config: the adapter's config; `target_modules` must be set (see `default_targets`).
        modules: the names of all modules.
        linear: the names `all-linear` stands for.

    Raises:
        InputError: if nothing matches.
    """
    targets = config.target_modules
    if targets is None:
        raise InputError("Please specify `target_modules` in `peft_config`", field="target_modules")
    if DUMMY_TARGET_MODULES in _as_list(targets):
        return []
    modules = list(modules)
    if config.is_all_linear:
        chosen = list(linear)
    else:
        chosen = [name for name in modules if name and matches(targets, name, field="target_modules")]
    if not chosen:
        leaves = sorted({name.rpartition(".")[2] for name in modules} - {""})
        raise NoMatchingPeftModuleError(
            f"Target modules {printable(_shown(targets), 400)} not found in the base model. "
            "Please check the target modules and try again.",
            field="target_modules",
            allowed=", ".join([name for name in leaves if not name.isdecimal()][:MAX_LISTED]),
        )
    return config.narrowed(_without_excluded(config, _within_layers(config, chosen)))


def shortest_names(chosen: list[str], modules: Iterable[str]) -> list[str]:
    """Names that mean these modules and no others: in full as long as they are few, else their shortest endings."""
    if len(chosen) < MIN_SHORTENED:
        return chosen
    endings = {
        name: [".".join(parts[i:]) for i in range(len(parts))] for name in modules for parts in [name.split(".")]
    }
    taken = {ending for name in endings.keys() - set(chosen) for ending in endings[name]}
    return sorted({next(ending for ending in reversed(endings[name]) if ending not in taken) for name in chosen})


def unmatched(config: TunerConfig, modules: Iterable[str]) -> list[tuple[str, str]]:
    """Field and entry of what `target_modules` and `exclude_modules` name and the model has not.

    A misspelling is hidden by its neighbours in a list (peft#1959); an exclusion that means nothing is hidden always.
    """
    names = list(modules)
    known = {".".join(parts[start:]) for parts in (name.split(".") for name in names) for start in range(len(parts))}
    found = []
    for field in ("target_modules", "exclude_modules"):
        given = getattr(config, field)
        if isinstance(given, (set, list)):
            found += [(field, entry) for entry in sorted(set(given) - known - {DUMMY_TARGET_MODULES})]
        elif field == "exclude_modules" and given and not any(matches(given, name, field=field) for name in names):
            found.append((field, given))
    return found


def unmatched_patterns(config: PeftConfig, adapted: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Field and key of every entry of `rank_pattern` and `alpha_pattern` that means no adapted module."""
    names = list(adapted)
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field, None) or {}:
            if not any(pattern_value({key: True}, name, False, field=field) for name in names):
                yield field, key


def _within_layers(config: TunerConfig, chosen: list[str]) -> list[str]:
    kept = [name for name in chosen if _in_layers(config, name)]
    if not kept:
        layers = sorted({index for name in chosen if (index := layer_index(name, config.layers_pattern)) is not None})
        raise InputError(
            f"no target module lies in the layers {config.layers_to_transform}",
            field="layers_to_transform",
            allowed=f"{layers[0]} to {layers[-1]}" if layers else "none: the targets are not in numbered layers",
        )
    return kept


def _without_excluded(config: TunerConfig, chosen: list[str]) -> list[str]:
    excluded = config.exclude_modules
    if not excluded:
        return chosen
    kept = [name for name in chosen if not matches(excluded, name, field="exclude_modules")]
    if not kept:
        raise NoMatchingPeftModuleError(
            "All modules were excluded. This is likely unintended. Check your `target_modules`, "
            "`exclude_modules` and `modules_to_save` configuration.",
            field="exclude_modules",
        )
    return kept


def _in_layers(config: TunerConfig, module: str) -> bool:
    wanted, targets = config.layers_to_transform, config.target_modules
    if wanted is None or (isinstance(targets, (set, list)) and module in targets):  # named in full: it is meant
        return True
    index = layer_index(module, config.layers_pattern)
    return index is not None and index in ([wanted] if isinstance(wanted, int) else wanted)


def layer_index(module: str, pattern: list[str] | str | None = None) -> int | None:
    """The number of the layer a module lies in: the first number in its path, or the one after a list's name."""
    parts = module.split(".")
    lists = [pattern] if isinstance(pattern, str) else pattern
    for before, part in pairwise(parts):
        if part.isdecimal() and (not lists or before in lists):
            return int(part)
    return None


def default_targets(method: str, model_type: str | None, *, table: str = "targets") -> list[str] | str | None:
    """The usual `target_modules` of a model type, or None where there is no custom.

    Args:
        method: PEFT's type; a method without an entry of its own uses LoRA's.
        model_type: `config.model_type` of the base.
        table: `targets`, or `feedforward` for IA3's second list.
    """
    defaults = _defaults()
    own = defaults.get(method, {})
    common = defaults["LORA"][table] if table == "targets" and not own.get("alone") else {}
    return {**common, **own.get(table, {})}.get(str(model_type), own.get("otherwise"))


@cache
def _defaults() -> dict[str, Any]:
    import yaml

    text = files("peftcli.adapters").joinpath("target_defaults.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def _shown(targets: Iterable[str] | str) -> str:
    """`target_modules` as PEFT's messages write them."""
    return targets if isinstance(targets, str) else "{" + ", ".join(map(repr, sorted(targets))) + "}"


def _as_list(names: Iterable[str] | str) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
