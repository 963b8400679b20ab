r"""`rank_pattern` and `alpha_pattern` as PEFT 0.13 reads them: one key serves both.

There the first key of either pattern that matches a module (`.*\.KEY$`; LoHa, LoKr: `(.*\.)?KEY$`) is looked up in both; if
none does, the module's path is (LoHa, LoKr: its last part). Later versions search each pattern by itself, with KEY in
brackets (`targets.pattern_value`). So a rank's key can hide an alpha there, and `q|v` means something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

from peftcli.adapters.expressions import fullmatch
from peftcli.adapters.keys import PREFIX
from peftcli.adapters.targets import pattern_value
from peftcli.errors import InputError

Config = TypeVar("Config")
Pair = tuple[int, float]


def follow_old_patterns(config: Any, keys: Iterable[str]) -> None:
    """Make the patterns of a config that PEFT 0.13 wrote mean today what they meant there, if they would not.

    One that is no honest expression stays as it is, for who looks at it next to refuse it with its place.

    Args:
        config: read from a file; changed.
        keys: of the file's tensors.
    """
    if (config.rank_pattern or config.alpha_pattern) and config.file_keys and "exclude_modules" not in config.file_keys:
        parts = (key.removeprefix(PREFIX).partition(f".{config.prefix}") for key in keys)
        modules = [module for module, found, _ in parts if found]
        with suppress(InputError):
            today = {module: values_now(config, module) for module in modules}
            meant = {module: old_values(config, module) for module in modules}
            if meant != today:
                config.rank_pattern, config.alpha_pattern = _by_path(meant)


def read_alike(config: Config, modules: Iterable[str]) -> Config:
    """The config with patterns that mean the same to every PEFT: by whole paths where the versions disagree."""
    settings: Any = config
    if not (settings.rank_pattern or settings.alpha_pattern):
        return config
    meant = {module: values_now(settings, module) for module in modules}
    if all(old_values(settings, module) == values for module, values in meant.items()):
        return config
    ranks, alphas = _by_path(meant)
    return replace(settings, rank_pattern=ranks, alpha_pattern=alphas)


def values_now(config: Any, module: str) -> Pair:
    """(rank, alpha) of a module."""
    rank = pattern_value(config.rank_pattern, module, config.r, field="rank_pattern")
    return rank, pattern_value(config.alpha_pattern, module, _alpha(config), field="alpha_pattern")


def old_values(config: Any, module: str) -> Pair:
    """(rank, alpha) of a module by PEFT 0.13's rule."""
    is_lora = config.peft_type == "LORA"
    before = r".*\." if is_lora else r"(.*\.)?"
    found = module if is_lora else module.rpartition(".")[2]
    for key in chain(config.rank_pattern, config.alpha_pattern):
        if fullmatch(rf"(?:{before}{key}$).*", module, field="rank_pattern"):
            found = key
            break
    return config.rank_pattern.get(found, config.r), config.alpha_pattern.get(found, _alpha(config))


def _alpha(config: Any) -> float:
    return config.lora_alpha if config.peft_type == "LORA" else config.alpha


def _by_path(values: dict[str, Pair]) -> tuple[dict[str, int], dict[str, float]]:
    """Both patterns by whole paths; the longer first, since a path may end with another."""
    paths = sorted(values, key=len, reverse=True)
    return {path: values[path][0] for path in paths}, {path: values[path][1] for path in paths}
