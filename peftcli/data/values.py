"""Values of rows, checked strictly."""

from __future__ import annotations

from typing import Any

from peftcli.errors import InputError, printable

_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"must be a string, but is {kind(value)}", field=column)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"holds half a surrogate pair at character {error.start}", field=column) from error
    return value


def objects(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        shown = printable(repr(value), 80) if value is not None else "null"
        raise InputError(f"must be a list of objects, but is {shown}", field=column)
    if not value:
        raise InputError("is an empty list", field=column)
    return value
