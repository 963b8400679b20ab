"""What the schema can say and this version cannot do yet. Each is refused by name before anything starts.

Building one of these means deleting its line here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from peftcli.recipe.nodes import Location

if TYPE_CHECKING:
    from peftcli.recipe.schema import Recipe

LAUNCHERS = ("auto", "none", "accelerate", "deepspeed", "fsdp")


def unsupported(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Location and reason of everything in `recipe` that cannot be done yet."""
    for location, value, able in _choices(recipe):
        if value not in able:
            yield location, f"`{value}` is not supported yet; today: {', '.join(able)}"


def _choices(recipe: Recipe) -> Iterator[tuple[Location, str, tuple[str, ...]]]:
    yield ("launcher", "type"), recipe.launcher.type, LAUNCHERS
