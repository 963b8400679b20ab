"""FSDP files: accelerate's format, of which the section `fsdp_config` says how to shard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.errors import InputError

if TYPE_CHECKING:
    from peftcli.recipe.schema import Recipe


def completed(values: dict[str, Any], recipe: Recipe, processes: int, *, place: Path) -> dict[str, Any]:
    """The section `fsdp_config` of a file.

    Raises:
        InputError: it has none.
    """
    section = values.get("fsdp_config")
    if not isinstance(section, dict):
        raise InputError("has no section fsdp_config", place=place, field="launcher.config")
    return section
