"""Values of rows, checked strictly."""

from __future__ import annotations

from typing import Any

from peftcli.errors import InputError, printable


def text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise InputError(f"must be a string, but is {kind}", field=column)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"holds half a surrogate pair at character {error.start}", field=column) from error
    return value


def objects(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InputError(f"must be a list of objects, but is {printable(repr(value), 80)}", field=column)
    if not value:
        raise InputError("is an empty list", field=column)
    return value
