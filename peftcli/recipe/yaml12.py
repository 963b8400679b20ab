"""YAML as recipes allow it: one document of maps, lists and YAML 1.2 scalars, each value with its place.

PyYAML only splits the text into events. What it would do next is done here, strictly: `1e-4` is a float, `no` a string,
a key may not come twice, and aliases, tags and directives are refused, so a file can neither run code nor explode.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from peftcli.errors import InputError, InputErrors, printable
from peftcli.files import read_bounded
from peftcli.recipe.nodes import Location, Node, Origin, Scalar, dotted

MAX_BYTES = 1 << 20  # without comment lines
MAX_BYTES_READ = 16 << 20
MAX_DEPTH = 24
MAX_DIGITS = 64

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same events, 50 times faster, where libyaml is there

_COMMENT_LINE = re.compile(rb"^[ \t]*#.*\n?", re.MULTILINE)
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_NULL = re.compile(r"null|Null|NULL|~|")
_TRUE, _FALSE = re.compile("true|True|TRUE"), re.compile("false|False|FALSE")
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def read(path: Path) -> Node:
    """The one document of a YAML file.

    Raises:
        InputError: if the file cannot be read, is too large, not UTF-8, not YAML or more than plain values.
    """
    origin = Origin(printable(path), path.absolute().parent)
    text = _text(path)
    character = _NOT_TEXT.search(text)
    if character:
        line, column = _line_and_column(text, character.start())
        code = ord(character[0])
        raise InputError(f"character U+{code:04X} is not allowed on line {line}", place=origin.place(line, column))
    node = parse(text, origin)
    if node is None:
        raise InputError("holds no recipe: the file is empty", place=path)
    return node


def parse(text: str, origin: Origin) -> Node | None:
    """The one document in `text`, or None if there is none.

    Raises:
        InputErrors: with every duplicate key, alias, tag and ambiguous number.
    """
    composer = _Composer(text, origin)
    try:
        node = composer.document()
    except yaml.YAMLError as error:
        raise _syntax_error(error, origin) from None
    if composer.problems:
        raise InputErrors(composer.problems)
    return node


def resolve(text: str) -> Scalar:
    """A plain scalar's value by the YAML 1.2 core schema.

    Raises:
        ValueError: if the number means different things in YAML 1.1 and 1.2, or is absurdly long.
    """
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _LEADING_ZERO.fullmatch(text):
        raise ValueError(f"{text[:MAX_DIGITS]} is octal in YAML 1.1 and decimal in 1.2: write it without leading zeros")
    integer, decimal = _INTEGER.fullmatch(text), _FLOAT.fullmatch(text)
    if (integer or decimal) and len(text) > MAX_DIGITS:
        raise ValueError(f"is a number of {len(text)} characters")
    if integer:
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if decimal:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def refuse_control_characters(text: str) -> None:
    """Raise ValueError if `text` holds a character that no name, path or number has."""
    control = _NOT_TEXT.search(text)
    if control:
        raise ValueError(f"{printable(repr(text), 80)} holds the character U+{ord(control[0]):04X}")


class _Composer:
    """Builds nodes from PyYAML's events and collects what is refused."""

    def __init__(self, text: str, origin: Origin) -> None:
        self.events = yaml.parse(text, Loader=LOADER)
        self.origin = origin
        self.problems: list[InputError] = []
        self.aliases: dict[str, str] = {}

    def document(self) -> Node | None:
        next(self.events)  # the stream starts
        start: Any = next(self.events)
        if isinstance(start, yaml.StreamEndEvent):
            return None
        if start.version or start.tags:
            self.refuse("directives (`%YAML`, `%TAG`) are not allowed on line {line}", start)
        node = self.node(next(self.events), ())
        next(self.events)  # the document ends
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise InputError("holds several documents (`---`): a recipe is one", place=self.place(after))
        if self.aliases:
            fields = list(self.aliases)
            more = f" and {len(fields) - 12} more" if len(fields) > 12 else ""
            self.problems.append(
                InputError(
                    "an alias (`*name`) is not allowed",
                    place=self.aliases[fields[0]],
                    field=", ".join(fields[:12]) + more,
                    fix="write the value out, or share values between recipes with `extends`",
                )
            )
        return node

    def node(self, event: Any, location: Location) -> Node:
        if len(location) > MAX_DEPTH:
            raise InputError(f"is nested more than {MAX_DEPTH} levels deep", place=self.place(event))
        if isinstance(event, yaml.AliasEvent):
            self.aliases.setdefault(dotted(step for step in location if isinstance(step, str)), self.place(event))
            return self.made(None, event)
        if event.tag is not None:
            self.refuse(f"the tag {printable(event.tag)} is not allowed on line {{line}}", event, location)
        if isinstance(event, yaml.MappingStartEvent):
            return self.made(self.map(location), event)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.made(self.list(location), event)
        return self.made(self.scalar(event, location), event)

    def map(self, location: Location) -> dict[str, Node]:
        result: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.scalar(event, location) if isinstance(event, yaml.ScalarEvent) else None
            if not isinstance(key, str):
                shown = printable(event.value) if isinstance(event, yaml.ScalarEvent) else "a map, list or alias"
                self.refuse(f"the key {shown} is not a name: quote it if a string is meant", event, location)
                key = ""
                if isinstance(event, yaml.CollectionStartEvent):
                    self.node(event, (*location, key))  # passed over: the value comes behind all that is in the key
            elif key == "<<":
                self.refuse("merge keys (`<<`) are not allowed: use `extends`", event, location)
            elif key in result:
                self.refuse(f"duplicate key (first {result[key].key_place})", event, (*location, key))
            node = self.node(next(self.events), (*location, key))
            node.key_place = self.place(event)
            result.setdefault(key, node)
        return result

    def list(self, location: Location) -> list[Node]:
        result: list[Node] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            result.append(self.node(event, (*location, len(result))))
        return result

    def scalar(self, event: Any, location: Location) -> Scalar:
        text: str = event.value
        try:
            refuse_control_characters(text)
            return resolve(text) if event.implicit[0] else text  # a quoted scalar is text
        except ValueError as error:
            self.refuse(str(error), event, location)
            return None

    def made(self, value: Any, event: Any) -> Node:
        return Node(value, self.origin, event.start_mark.line + 1, event.start_mark.column + 1)

    def place(self, event: Any) -> str:
        return self.origin.place(event.start_mark.line + 1, event.start_mark.column + 1)

    def refuse(self, problem: str, event: Any, location: Location = ()) -> None:
        problem = problem.replace("{line}", str(event.start_mark.line + 1))
        self.problems.append(InputError(problem, place=self.place(event), field=dotted(location) or None))


def _text(path: Path) -> str:
    """The file's text, whose size is counted without comment lines."""
    raw = read_bounded(path, MAX_BYTES_READ)
    if len(_COMMENT_LINE.sub(b"", raw)) > MAX_BYTES:
        raise InputError(f"is larger than {MAX_BYTES >> 20} MB: not a recipe", place=path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problem = f"is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise InputError(problem, place=f"{path}:{line}", fix="save the file as UTF-8") from None


def _line_and_column(text: str, offset: int) -> tuple[int, int]:
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def _syntax_error(error: yaml.YAMLError, origin: Origin) -> InputError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = " ".join(part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part)
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    if "nesting depth" in what:  # PyYAML from 6.0.4 has a bound of its own
        return InputError(f"is nested more than {MAX_DEPTH} levels deep", place=origin.place(line, column))
    return InputError(
        f"is not YAML on line {line}: {what or 'unreadable'}",
        place=origin.place(line, column),
        fix="tabs cannot indent; strings with `: `, ` #`, `@`, `*` or `&` need quotes" if mark else None,
    )
