"""What a value should have been, where pydantic says that it isn't: in a recipe's words instead of Python's."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from peftcli.errors import nearest

_WORDS = {
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
    "set_type": "a list",
    "tuple_type": "a string or a list",
    "none_required": "null",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "string_too_short": "a string that is not empty",
    "string_too_long": "a string of at most {max_length} characters",
    "string_pattern_mismatch": "a string that matches {pattern}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
}


def allowed(errors: Iterable[Any]) -> str:
    """What would have been accepted.

    Args:
        errors: of one value: one for each type it could have had.
    """
    return ", or ".join(dict.fromkeys(_wanted(error) for error in errors))


def meant(value: object, errors: Iterable[Any]) -> str | None:
    """Advice on a misspelt one of several names, or None."""
    names = [
        name for error in errors if error["type"] == "literal_error" for name in re.findall(r"'([^']*)'", error["msg"])
    ]
    return str(nearest(value, names)) or None if isinstance(value, str) else None


def _wanted(error: Any) -> str:
    words = _WORDS.get(error["type"])
    if words is None:
        return str(error["msg"]).removeprefix("Input should be ").replace("'", "")
    return words.format(**{name: _number(value) for name, value in error.get("ctx", {}).items()})


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
