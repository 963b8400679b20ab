"""Factors written as a LoRA adapter: names, shapes, and a config that means exactly them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.adapters.base import SiteShape
from peftcli.adapters.config import CONFIG_NAME, PeftConfig, TunerConfig
from peftcli.adapters.fused_parameters import file_path
from peftcli.adapters.keys import PREFIX
from peftcli.adapters.methods.lora import LoraConfig
from peftcli.adapters.targets import DUMMY_TARGET_MODULES
from peftcli.errors import InputError, printable
from peftcli.lazy import numpy
from peftcli.merging.algebra import LowRank, padded

if TYPE_CHECKING:
    from numpy.typing import NDArray


def module_tensors(
    shape: SiteShape, factors: Sequence[LowRank], rank: int, modules: Iterable[str]
) -> dict[str, NDArray[Any]]:
    """The tensors of one module by their key in the file, float32; the scaling is 1.

    Args:
        shape: the module.
        factors: one product; of a parameter that holds experts in one, each expert's.
        rank: what they are filled up to.
        modules: all that are adapted.
    """
    filled = [padded(pair, rank) for pair in factors]
    if not all(numpy.isfinite(factor).all() for pair in filled for factor in (pair.a, pair.b)):
        raise InputError("its update holds numbers too large for 32 bits", place=printable(shape.name))
    if shape.kind != "parameter":
        return lora_tensors(shape, filled[0])
    prefix = PREFIX + file_path(shape.name, modules)
    a = numpy.concatenate([pair.a for pair in filled])
    b = numpy.stack([pair.b for pair in filled], axis=-1)  # experts vary fastest
    return {f"{prefix}.lora_A.weight": a.astype("f4"), f"{prefix}.lora_B.weight": b.reshape(len(b), -1).astype("f4")}


def lora_tensors(shape: SiteShape, factors: LowRank) -> dict[str, NDArray[Any]]:
    """The tensors of one module whose weight is a matrix, as above."""
    a, b = (factor.astype("f4", copy=False) for factor in (factors.a, factors.b))
    prefix = f"{PREFIX}{shape.name}."
    if shape.kind == "embedding":
        return {f"{prefix}lora_embedding_A": a, f"{prefix}lora_embedding_B": b}
    if shape.kind == "conv":
        a = a.reshape(len(a), -1, *shape.kernel)
        b = b.reshape(*b.shape, *(1,) * len(shape.kernel))
    return {f"{prefix}lora_A.weight": a, f"{prefix}lora_B.weight": b}


def copy_key(name: str, modules: Iterable[str]) -> str:
    """The key of a tensor trained in full, by its name in the base: an adapted module's own bias lies behind `base_layer`."""
    module, _, leaf = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{leaf}" if module in modules else PREFIX + name


def lora_config(parents: list[PeftConfig], ranks: Mapping[str, int], **fields: Any) -> LoraConfig:
    """The config of factors whose scaling is 1: alpha is the rank everywhere.

    Args:
        parents: configs of the adapters it comes from; the first names base and task.
        ranks: rank of each module.
        fields: values that differ from that.
    """
    first = parents[0]
    counts = Counter(ranks.values())
    r = max(ranks.values(), key=lambda rank: (counts[rank], rank)) if ranks else 1
    fused = sorted({name for parent in parents for name in getattr(parent, "target_parameters", None) or []})
    modules = [module for module in ranks if not any(f".{module}".endswith(f".{name}") for name in fused)]
    other = {pattern_key(module, ranks): rank for module, rank in ranks.items() if rank != r}
    values: dict[str, Any] = {
        "task_type": first.task_type,
        "base_model_name_or_path": first.base_model_name_or_path,
        "revision": first.revision,
        "auto_mapping": first.auto_mapping,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "target_modules": target_modules(parents, modules) if modules else [] if fused else [DUMMY_TARGET_MODULES],
        "target_parameters": fused or None,
        "fan_in_fan_out": any(getattr(parent, "fan_in_fan_out", False) for parent in parents),
        "layer_replication": getattr(first, "layer_replication", None),
    }
    return LoraConfig(**{**values, **fields})


def target_modules(parents: Iterable[PeftConfig], modules: Iterable[str]) -> list[str]:
    """Names that mean these modules: the parents' own lists where those are plain, else each module by its path."""
    names: set[str] = set()
    for parent in parents:
        targets = getattr(parent, "target_modules", None)
        if not isinstance(parent, TunerConfig) or not isinstance(targets, (set, list)):
            return sorted(modules)
        if parent.layers_to_transform is not None or parent.exclude_modules:
            return sorted(modules)
        names |= set(targets)
    used = {name for name in names if any(f".{module}".endswith(f".{name}") for module in modules)}
    reached = all(any(f".{module}".endswith(f".{name}") for name in used) for module in modules)
    return sorted(used if reached else modules)


def pattern_key(module: str, modules: Iterable[str]) -> str:
    """A key of rank_pattern that matches one module in every PEFT: 0.13.0 wants something before its dot."""
    shorter = module.partition(".")[2]
    if shorter and sum(f".{other}".endswith(f".{shorter}") for other in modules) == 1:
        return shorter
    return module


def write_config(folder: Path, config: PeftConfig) -> None:
    """Write `adapter_config.json`."""
    (folder / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")
