"""Pydantic's complaints in the recipe's own terms: place, field, value, what is allowed, what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from peftcli.allowed import allowed, meant
from peftcli.errors import InputError, nearest, printable
from peftcli.recipe.adapter_section import NAME, VALUE
from peftcli.recipe.hints import foreign_hint, hint
from peftcli.recipe.nodes import Location, Node, dotted
from peftcli.recipe.redact import redact
from peftcli.recipe.schema import SOURCES_TAG, SPLIT_TAG

MAX_PROBLEMS = 19  # and a line about the rest: as many as InputErrors shows

_SAID_BY_HAND = {"data.eval": "{split: 0.05}, a path, or a list of {path: ...}"}
"""What is allowed where pydantic knows only what the last of several forms would have been."""
_BOOLEANS_OF_YAML_1_1 = {"yes", "no", "on", "off", "y", "n"}


def located(errors: Sequence[Any], root: Node) -> list[InputError]:
    """One problem for each field that pydantic complains about, in the order of the schema."""
    by_field: dict[Location, list[Any]] = {}
    for error in errors:
        by_field.setdefault(_written(error["loc"], root, missing=error["type"] in ("missing", NAME, VALUE)), []).append(
            error
        )
    found = [_problem(location, group, root) for location, group in list(by_field.items())[:MAX_PROBLEMS]]
    if len(by_field) > MAX_PROBLEMS:
        found.append(InputError(f"and {len(by_field) - MAX_PROBLEMS} more problems", place=root.origin.name))
    return found


def problem(location: Location, text: str, root: Node, *, fix: str | None = None) -> InputError:
    """A problem with the value at `location`."""
    location = _written(location, root)
    return InputError(text, place=root.nearest(location).place, field=dotted(location), fix=fix)


def _written(loc: Location, root: Node, *, missing: bool = False) -> Location:
    """`loc` as far as the recipe spells it out: without unions' tags and the list around a single source.

    Args:
        missing: the last step is the name of a field that is not there.
    """
    loc = tuple(step for step in loc if step not in (SPLIT_TAG, SOURCES_TAG))
    node = root
    written: list[str | int] = []
    for position, step in enumerate(loc):
        below = node.child(step)
        if below is None:
            if isinstance(node.value, dict) and isinstance(step, int):
                continue  # one source may stand where a list of them may
            return (*written, step) if missing and position == len(loc) - 1 else tuple(written)
        node = below
        written.append(step)
    return tuple(written)


def _problem(location: Location, group: list[Any], root: Node) -> InputError:
    error = group[0]
    node, name, kind = root.nearest(location), dotted(location), error["type"]
    context = error.get("ctx", {})
    if kind == "missing":
        return InputError("is missing", place=node.place, field=name, fix=_typed_for(location, node) or _example(name))
    if kind == "extra_forbidden":
        return InputError("unknown field", place=node.key_place, field=printable(name), fix=hint(location))
    if "problem" in context:
        if kind == NAME:
            fix = foreign_hint(location) or context.get("fix") or hint(location)
            return InputError(context["problem"], place=node.key_place, field=name, fix=fix)
        about = root.nearest(_field_in(context["problem"])) if not location else node
        text = redact(context["problem"])
        return InputError(
            text, place=about.place, field=name or None, allowed=context.get("allowed"), fix=context.get("fix")
        )
    shown = printable(redact(repr(node.plain())), 80)
    problem = "is empty" if node.value is None else f"{shown} is not accepted"
    return InputError(
        problem,
        place=node.place,
        field=name or None,
        allowed=_SAID_BY_HAND.get(name) or allowed(group),
        fix=_fix(group, node),
    )


_FIELD = re.compile(r"\b(?:model|adapter|quantization|data|training|preference|launcher)(?:\.\w+)+")


def _field_in(sentence: str) -> list[str | int]:
    """The first field that a sentence about several names: where to look."""
    named = _FIELD.search(sentence)
    return [int(step) if step.isdigit() else step for step in named[0].split(".")] if named else []


def _typed_for(location: Location, node: Node) -> str | None:
    """What may have been meant to be the missing field, where nothing else is said of it: a misspelt `method`."""
    if dotted(location) != "adapter.method" or not isinstance(node.value, dict):
        return None
    close = nearest("method", node.value).name
    return f"`{close}` is no field of adapter: did you mean `method`?" if close else None


def _fix(group: list[Any], node: Node) -> str | None:
    value = node.value
    if group[0]["type"] == "bool_type" and isinstance(value, str) and value.lower() in _BOOLEANS_OF_YAML_1_1:
        return "in YAML 1.2 only true and false are truth values"
    return meant(value, group)


def _example(name: str) -> str | None:
    examples = {
        "model": "model: {name_or_path: meta-llama/Llama-3.2-1B}",
        "model.name_or_path": "a hub id, a folder, a .gguf file, or package:NAME",
        "adapter": "adapter: {method: lora}",
        "adapter.method": "method: lora",
        "data": "data: {train: train.jsonl}",
        "data.train": "a path, or a list of {path: ...}",
        "training": "training: {output_dir: out/run}",
        "training.output_dir": "a folder for this run, e.g. out/run",
    }
    return examples.get(name)
