"""Launcher files: found by name or path, checked against the recipe, completed, and kept in the run folder.

| launcher.type | file | read by |
|---|---|---|
| auto, accelerate | `accelerate/*.yaml` | `accelerate launch` |
| deepspeed | `deepspeed/*.json`, DeepSpeed's own format | the worker |
| fsdp | `fsdp/*.yaml`, accelerate's format; only `fsdp_config` counts | the worker |

Processes are always started by `accelerate launch` with one of `accelerate/`. Values that the recipe decides are `auto` in
a strategy's file; one that says something else than the recipe is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.errors import InputError, printable
from peftcli.files import read_strict_json

if TYPE_CHECKING:
    from peftcli.recipe.schema import Recipe

CONFIGS = Path(str(files("peftcli"))) / "configs"
"""Launcher files, also at the repository's top as `configs/`."""

RESOLVED = "launcher.json"
"""The strategy's file, completed; in the run folder's `data/`, which comes and goes with the recipe."""

AUTO = "auto"
SUFFIX = {"accelerate": ".yaml", "deepspeed": ".json", "fsdp": ".yaml"}
DEFAULTS = {"deepspeed": "zero2", "fsdp": "fsdp"}


def find(kind: str, name: str) -> Path:
    """A launcher file: by its path, or by the name of one of ours.

    Args:
        kind: `accelerate`, `deepspeed` or `fsdp`.
        name: as in `launcher.config`; paths are absolute.

    Raises:
        InputError: if there is none.
    """
    if os.path.isabs(name):
        return Path(name)
    files = {kind: {file.stem: file for file in (CONFIGS / kind).glob(f"*{SUFFIX[kind]}")} for kind in SUFFIX}
    if name in files[kind]:
        return files[kind][name]
    others = [other for other in files if name in files[other]]
    raise InputError(
        f"there is no launcher file {printable(repr(name))} for {kind}",
        field="launcher.config",
        fix=f"set launcher.type: {others[0]}" if others else f"one of {', '.join(sorted(files[kind]))}, or a path",
    )


def resolve(recipe: Recipe, processes: int) -> dict[str, Any]:
    """The strategy's file with everything filled in; empty for launchers without one, whose file is only checked.

    Args:
        processes: of all machines.

    Raises:
        InputError: there is no such file, it is none, or it contradicts the recipe; naming both places.
    """
    launcher = recipe.launcher
    if launcher.type not in DEFAULTS:
        if launcher.config is not None and os.path.isabs(launcher.config):  # ours agree with every recipe
            from peftcli.launchers import accelerate

            path = Path(launcher.config)
            accelerate.check(_read_yaml(path), recipe, processes, place=path)
        return {}
    path, values = _file(recipe)
    if launcher.type == "deepspeed":
        from peftcli.launchers import deepspeed

        return deepspeed.completed(values, recipe, processes, place=path)
    from peftcli.launchers import fsdp

    return fsdp.completed(values, recipe, processes, place=path)


def write(folder: Path, resolved: Mapping[str, Any]) -> None:
    """Keep a resolved file for the worker."""
    if resolved:
        (folder / RESOLVED).write_text(json.dumps(resolved, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """What `write` kept; empty where there is nothing."""
    path = folder / RESOLVED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def contradictions(values: Mapping[str, Any], decided: Mapping[str, Any], place: Path) -> Iterator[InputError]:
    """What a file says and the recipe does not.

    Args:
        values: the file's; `auto` and what is missing agree with everything.
        decided: by the file's names, what the recipe makes them.
        place: the file.
    """
    for name, value in decided.items():
        stated = values.get(name, AUTO)
        if stated not in (AUTO, None, value):
            yield InputError(
                f"is {printable(stated)}, but the recipe makes it {value}",
                place=place,
                field=name,
                fix="leave it out, or change the recipe",
            )


def _read_yaml(path: Path) -> dict[str, Any]:
    from peftcli.recipe import yaml12

    values = yaml12.read(path).plain()
    if not isinstance(values, dict):
        raise InputError("is no launcher file: it holds no mapping", place=path, field="launcher.config")
    return values


def shards_base(recipe: Recipe) -> bool:
    """Whether no process holds the whole base: FSDP, or ZeRO-3."""
    if recipe.launcher.type != "deepspeed":
        return recipe.launcher.type == "fsdp"
    from peftcli.launchers import deepspeed

    return deepspeed.stage(_file(recipe)[1]) == 3


def offloaded(recipe: Recipe) -> frozenset[str]:
    """Which of `base`, `gradients` and `optimizer` are kept in main memory between their uses.

    Offloading moves what is sharded: FSDP's base, with gradients and moments of its own if it is trained; ZeRO's optimizer.
    """
    if recipe.launcher.type not in DEFAULTS:
        return frozenset()
    (_, values), full = _file(recipe), recipe.adapter.config is None
    if recipe.launcher.type == "fsdp":
        moved = values["fsdp_config"].get("fsdp_offload_params", False)
        return frozenset({"base", "gradients", "optimizer"} if full else {"base"}) if moved else frozenset()
    from peftcli.launchers import deepspeed

    found = deepspeed.offloaded(values)
    names = {"base"} if "offload_param" in found else set()
    if "offload_optimizer" in found:
        names |= {"optimizer", "gradients"} if full and deepspeed.stage(values) == 3 else {"optimizer"}
    return frozenset(names)


def _file(recipe: Recipe) -> tuple[Path, dict[str, Any]]:
    """A strategy's file, and what is in it as it is."""
    launcher = recipe.launcher
    path = find(launcher.type, launcher.config or DEFAULTS[launcher.type])
    return path, read_strict_json(path) if launcher.type == "deepspeed" else _read_yaml(path)
