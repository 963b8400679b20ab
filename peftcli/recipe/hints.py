"""What to say about a name the schema does not know: the field meant, the section it belongs in, or another tool's word."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import get_args

from peftcli.errors import nearest, printable
from peftcli.recipe.adapter_section import AdapterSection, settable
from peftcli.recipe.nodes import Location, dotted
from peftcli.recipe.schema import DataSource, Recipe
from peftcli.recipe.section import Section

MIN_SPELLING = 3  # a shorter name is no misspelling of anything


def hint(location: Location) -> str | None:
    """Advice on the unknown field at `location`, or None."""
    *above, name = location
    if not isinstance(name, str):
        return None
    siblings = _children(tuple(above))
    close = nearest(name, siblings) if len(name) >= MIN_SPELLING else None
    if foreign := foreign_hint(location):
        return foreign
    if close and close.name:
        return str(close)
    if dotted(above) == "data" and name in DataSource.model_fields:
        return f"`{name}` belongs to a source: `train: {{path: FILE, {name}: ...}}`"
    homes = [home for home in _homes().get(name, []) if home != dotted(location)]
    if homes:
        return f"`{printable(name)}` belongs in `{homes[0]}`"
    return f"known here: {', '.join(siblings)}" if siblings else None


def foreign_hint(location: Location) -> str | None:
    """Where a recipe says what another tool's field says, or None."""
    name = location[-1]
    if name not in _foreign():
        return None
    tool, here = _foreign()[str(name)]
    owner = f"{tool}'" if tool.endswith("s") else f"{tool}'s"
    return f"`{name}` is {owner}; here " + (here if " " in here else f"`{here}`")


@cache
def _foreign() -> dict[str, tuple[str, str]]:
    import yaml

    text = (files("peftcli.recipe") / "hints.yaml").read_text(encoding="utf-8")
    return {name: (tool, here) for name, (tool, here) in yaml.safe_load(text).items()}


@cache
def sections() -> dict[str, type[Section]]:
    """The parts of a recipe by dotted name; `adapter` is left out, since its fields are the method's."""
    found: dict[str, type[Section]] = {"": Recipe, "data.train": DataSource, "data.eval": DataSource}
    for name, item in Recipe.model_fields.items():
        for cls in (item.annotation, *get_args(item.annotation)):
            if isinstance(cls, type) and issubclass(cls, Section) and cls is not AdapterSection:
                found[name] = cls
    return found


def _children(above: Location) -> list[str]:
    section = sections().get(dotted(step for step in above if isinstance(step, str)))
    return list(section.model_fields) if section else []


@cache
def _homes() -> dict[str, list[str]]:
    """Field name -> the dotted names it has in the recipe's sections (and in LoRA's config, the usual adapter)."""
    from peftcli.adapters.registry import config_class

    homes: dict[str, list[str]] = {}
    for section, cls in sections().items():
        if cls is DataSource:
            continue  # its names (path, name, split) mean something else everywhere else
        for name in cls.model_fields:
            homes.setdefault(name, []).append(f"{section}.{name}" if section else name)
    for name in ("method", *settable(config_class("LORA"))):
        homes.setdefault(name, []).append(f"adapter.{name}")
    return homes
