"""The recipe as a JSON schema, for editors: completion, bounds and documentation while typing."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from peftcli.adapters.config import PeftConfig
from peftcli.adapters.registry import config_class, method_names
from peftcli.recipe.adapter_section import FULL, settable
from peftcli.recipe.schema import Recipe

_ATTRIBUTE = re.compile(r"^    (\w+(?:, \w+)*): (.+(?:\n        .+)*)", re.MULTILINE)


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe file, `adapter` with the fields of every method."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    definitions["AdapterSection"] = {
        "description": inspect.getdoc(Recipe.model_fields["adapter"].annotation),
        "oneOf": [_method(name, definitions) for name in method_names()] + [_adapter(FULL, "No adapter.", {})],
    }
    schema["properties"] = {
        "extends": {"type": "string", "description": "Recipe this one is laid over: maps merge, lists are replaced."}
    } | schema["properties"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _method(name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    cls = config_class(name.upper())
    hints, described = get_type_hints(cls, include_extras=True), _descriptions(cls)
    defaults, properties = cls().to_dict(), {}
    for field in settable(cls):
        schema = TypeAdapter(hints[field]).json_schema(ref_template="#/$defs/{model}")
        definitions |= schema.pop("$defs", {})
        schema["default"] = defaults[field]
        if field in described:
            schema["description"] = described[field]
        properties[field] = schema
    return _adapter(name, (sys.modules[cls.__module__].__doc__ or "").split("\n")[0], properties)


def _adapter(name: str, description: str, properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "title": name,
        "description": description,
        "properties": {"method": {"const": name}, **properties},
        "required": ["method"],
        "additionalProperties": False,
    }


def _descriptions(cls: type[PeftConfig]) -> dict[str, str]:
    """What the `Attributes:` of a config's docstring and of its bases' say about each field."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, PeftConfig):
            for names, text in _ATTRIBUTE.findall(inspect.getdoc(base) or ""):
                found |= {name: " ".join(text.split()) for name in names.split(", ")}
    return found
