"""A recipe as a tree of values that remember where they stand, so that every later error can name file, line and column."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

Scalar = str | int | float | bool | None
Location = tuple[str | int, ...]
"""Keys and list indices from the top of the tree, as in pydantic's `loc`."""


@dataclass(frozen=True)
class Origin:
    """What a value was read from.

    Attributes:
        name: what messages call it: the file as the user typed it, or an override.
        folder: where the relative paths in it start.
        file: False for an override, which has no lines.
    """

    name: str
    folder: Path
    file: bool = True

    def place(self, line: int, column: int) -> str:
        return f"{self.name}:{line}:{column}" if self.file else self.name


@dataclass
class Node:
    """One value of a recipe: a scalar, a list of nodes or a map of nodes.

    Attributes:
        value: the value.
        origin, line, column: where it stands; lines and columns count from 1.
        key_place: where its key stands, for messages about the key itself.
    """

    value: Scalar | list[Node] | dict[str, Node]
    origin: Origin
    line: int = 1
    column: int = 1
    key_place: str = field(default="", compare=False)

    @property
    def place(self) -> str:
        return self.origin.place(self.line, self.column)

    def child(self, step: str | int) -> Node | None:
        """The value under a key or an index, if there is one."""
        if isinstance(self.value, dict) and isinstance(step, str):
            return self.value.get(step)
        if isinstance(self.value, list) and isinstance(step, int) and 0 <= step < len(self.value):
            return self.value[step]
        return None

    def nearest(self, location: Iterable[str | int]) -> Node:
        """The node at `location`, or the deepest one on the way to it."""
        node = self
        for step in location:
            below = node.child(step)
            if below is None:
                break
            node = below
        return node

    def plain(self) -> object:
        """The same tree without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def merge(below: Node, above: Node) -> Node:
    """`above` laid over `below`: maps merge deeply, everything else is replaced."""
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    merged = dict(below.value)
    for key, node in above.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return Node(merged, above.origin, above.line, above.column, above.key_place)


def dotted(location: Iterable[str | int]) -> str:
    """`('data', 'train', 0)` as `data.train.0`."""
    return ".".join(str(step) for step in location)


def walk(node: Node, location: Location = ()) -> Iterator[tuple[Location, Node]]:
    """Every node under `node` with its location, parents first."""
    yield location, node
    items: Iterable[tuple[str | int, Node]] = ()
    if isinstance(node.value, dict):
        items = node.value.items()
    elif isinstance(node.value, list):
        items = enumerate(node.value)
    for step, below in items:
        yield from walk(below, (*location, step))
