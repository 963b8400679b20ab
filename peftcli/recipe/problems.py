"""Pydantic's complaints in the recipe's own terms: place, field, value, what is allowed, what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from peftcli.errors import InputError, nearest, printable
from peftcli.recipe.adapter_section import NAME, VALUE
from peftcli.recipe.hints import hint
from peftcli.recipe.nodes import Location, Node, dotted
from peftcli.recipe.redact import redact
from peftcli.recipe.schema import SOURCES_TAG, SPLIT_TAG

MAX_PROBLEMS = 19  # and a line about the rest: as many as InputErrors shows

_ALLOWED = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "model_type": "a map of fields",
    "model_attributes_type": "a map of fields",
    "dict_type": "a map",
    "list_type": "a list",
    "tuple_type": "a string or a list",
    "string_too_short": "a string that is not empty",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
}
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
        return InputError("is missing", place=node.place, field=name, fix=_example(name))
    if kind == "extra_forbidden":
        return InputError("unknown field", place=node.key_place, field=printable(name), fix=hint(location))
    if "problem" in context:
        about_name = kind == NAME
        place = node.key_place if about_name else node.place
        fix = context.get("fix") or (hint(location) if about_name else None)
        return InputError(context["problem"], place=place, field=name or None, allowed=context.get("allowed"), fix=fix)
    allowed = list(dict.fromkeys(_allowed(item) for item in group))
    shown = printable(redact(repr(node.plain())), 80)
    problem = "is empty" if node.value is None else f"{shown} is not accepted"
    return InputError(
        problem, place=node.place, field=name or None, allowed=", or ".join(allowed), fix=_fix(group, node)
    )


def _allowed(error: Any) -> str:
    template = _ALLOWED.get(error["type"])
    if template is None:
        return str(error["msg"]).removeprefix("Input should be ").replace("'", "")
    return template.format(**{key: _number(value) for key, value in error.get("ctx", {}).items()})


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _fix(group: list[Any], node: Node) -> str | None:
    value = node.value
    if group[0]["type"] == "bool_type" and isinstance(value, str) and value.lower() in _BOOLEANS_OF_YAML_1_1:
        return "in YAML 1.2 only true and false are truth values"
    if isinstance(value, str):
        names = re.findall(r"'([^']*)'", " ".join(error["msg"] for error in group if error["type"] == "literal_error"))
        return str(nearest(value, names)) or None
    return None


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
