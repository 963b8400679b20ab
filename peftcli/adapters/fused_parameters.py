"""Which bare parameter (fused experts, `target_parameters`) the tensors at a path of an adapter file belong to.

A module's adapted parameters are nested: the first one the model registers is innermost, its tensors stand behind
`.base_layer`. A file does not tell that order; in every mixture transformers has, what leads up comes before what leads down.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peftcli.adapters.base import SiteShape
from peftcli.adapters.fit import Found
from peftcli.adapters.keys import base_path
from peftcli.adapters.targets import pattern_value


def fused_parameter(config: Any, path: str, paths: Mapping[str, Found]) -> SiteShape | None:
    """The shape of the parameter at `path`, named as in the model; None where the config targets none there.

    The file tells how many matrices are fused: A is [experts * r, in], B [out, experts * r].

    Args:
        config: the adapter's; its `target_parameters` are looked at.
        path: a path in the file.
        paths: all of them, with their tensors.
    """
    found = paths[path]
    a, b = found.get("lora_A.weight"), found.get("lora_B.weight")
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
        return None
    site = base_path(path)
    targets = (name.rpartition(".") for name in getattr(config, "target_parameters", None) or [])
    leaves = sorted({leaf for owner, _, leaf in targets if f".{site}".endswith(f".{owner}")}, key=_place)
    if not leaves:
        return None
    nested = sorted((other for other in paths if base_path(other) == site), key=len, reverse=True)
    name = f"{site}.{leaves[nested.index(path)]}" if len(nested) == len(leaves) else site
    r = pattern_value(config.rank_pattern, name, config.r, field="rank_pattern")
    return SiteShape(name, "parameter", a.shape[1], b.shape[0], experts=max(1, a.shape[0] // r))


def file_path(name: str, names: Iterable[str]) -> str:
    """The inverse: where a file holds a parameter's tensors, `names` being all that are adapted."""
    site, _, leaf = name.rpartition(".")
    leaves = {other.rpartition(".")[2] for other in names if other.rpartition(".")[0] == site}
    return site + ".base_layer" * sum(_place(other) > _place(leaf) for other in leaves)


def _place(leaf: str) -> tuple[bool, str]:
    return "down" in leaf, leaf
