"""Overrides typed after the recipe: `training.learning_rate=1e-4` sets a value, `~quantization` takes one out."""

from __future__ import annotations

import re
from pathlib import Path

from peftcli.errors import InputError, printable
from peftcli.recipe import yaml12
from peftcli.recipe.nodes import Node, Origin
from peftcli.recipe.redact import redact

_NAME = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")


def apply(root: Node, overrides: list[str]) -> None:
    """Change `root` as the overrides say, in their order.

    Raises:
        InputError: for an override that is not `name=value` or `~name`, or that deletes what is not there.
    """
    for text in overrides:
        origin = Origin(f"override `{printable(redact(text), 120)}`", Path.cwd(), file=False)
        if text.startswith("~"):
            _delete(root, text[1:], origin)
            continue
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError("is not `field=value` or `~field`", place=origin.name, fix=_fix(text))
        _set(root, _steps(name, origin), _value(value, origin))


def _value(text: str, origin: Origin) -> Node:
    """A value in flow style (`[a, b]`, `{a: 1}`, `"quoted"`) or, by far the most common, a plain scalar taken whole."""
    if text.startswith(("[", "{", '"', "'")):
        node = yaml12.parse(text, origin)
        if node is not None:
            return node
    try:
        yaml12.refuse_control_characters(text)
        return Node(yaml12.resolve(text), origin, key_place=origin.name)
    except ValueError as error:
        raise InputError(str(error), place=origin.name) from None


def _set(root: Node, steps: list[str], node: Node) -> None:
    node.key_place = node.place
    parent = root
    for step in steps[:-1]:
        below = parent.child(_index(parent, step))
        if below is None or below.value is None:
            below = Node({}, node.origin, key_place=node.place)
            _put(parent, step, below)
        parent = below
    _put(parent, steps[-1], node)


def _put(parent: Node, step: str, node: Node) -> None:
    index = _index(parent, step)
    if isinstance(parent.value, dict):
        parent.value[step] = node
    elif isinstance(parent.value, list) and isinstance(index, int) and index < len(parent.value):
        parent.value[index] = node
    else:
        raise InputError(f"there is nothing to hold `{printable(step)}`: {_kind(parent)}", place=node.origin.name)


def _delete(root: Node, name: str, origin: Origin) -> None:
    steps = _steps(name, origin)
    parent: Node | None = root
    for step in steps[:-1]:
        parent = parent.child(_index(parent, step)) if parent else None
    index = _index(parent, steps[-1]) if parent else ""
    if parent is None or parent.child(index) is None:
        raise InputError(f"the recipe does not set `{printable(name)}`", place=origin.name)
    if isinstance(parent.value, dict):
        del parent.value[steps[-1]]
    elif isinstance(parent.value, list) and isinstance(index, int):
        del parent.value[index]


def _steps(name: str, origin: Origin) -> list[str]:
    if not _NAME.fullmatch(name):
        raise InputError(f"`{printable(name)}` is not a field's name", place=origin.name, fix=_fix(name))
    return name.split(".")


def _index(parent: Node, step: str) -> str | int:
    return int(step) if isinstance(parent.value, list) and step.isascii() and step.isdigit() else step


def _kind(node: Node) -> str:
    return f"a list of {len(node.value)}" if isinstance(node.value, list) else "the value above it is not a map"


def _fix(text: str) -> str:
    if text.startswith("-"):
        return "options come before or after as `--name`, overrides as `training.learning_rate=1e-4`"
    return "for example `training.learning_rate=1e-4`"
