"""The schema itself: documented, covered by the JSON schema, and every word of advice leads somewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from peftcli.adapters.registry import config_class, method_names
from peftcli.recipe import hints
from peftcli.recipe.adapter_section import ELSEWHERE, settable
from peftcli.recipe.json_schema import recipe_schema
from peftcli.recipe.schema import EvalSplit, Recipe
from peftcli.recipe.section import Section

PARTS = [(name, cls) for name, cls in hints.sections().items() if cls is not Recipe] + [("data.eval", EvalSplit)]


@pytest.mark.parametrize(("name", "cls"), PARTS)
def test_every_field_says_what_it_means(name: str, cls: type[Section]) -> None:
    for field, info in cls.model_fields.items():
        assert info.description, f"{name}.{field}"


def leaves(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, f"{path}.{name}" if path else name)
    else:
        yield path


def test_sections_are_frozen() -> None:
    recipe = smallest()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.training.seed = 1  # type: ignore[misc]


def smallest() -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name_or_path": "x"},
            "adapter": {"method": "lora"},
            "data": {"train": "x.jsonl"},
            "training": {"output_dir": "/tmp/x"},
        }
    )


class TestJsonSchema:
    def test_is_json(self) -> None:
        assert json.loads(json.dumps(recipe_schema()))["additionalProperties"] is False

    def test_references_lead_somewhere(self) -> None:
        schema = recipe_schema()
        names = set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(schema)))
        assert names == set(schema["$defs"])

    def test_covers_every_field(self) -> None:
        schema = recipe_schema()
        assert set(schema["properties"]) == {"extends", *Recipe.model_fields}
        for _, cls in PARTS:
            properties = schema["$defs"][cls.__name__]["properties"]
            assert set(properties) == set(cls.model_fields)
            assert all("description" in item for item in properties.values())

    def test_covers_every_method(self) -> None:
        adapters = {item["title"]: item["properties"] for item in recipe_schema()["$defs"]["AdapterSection"]["oneOf"]}
        assert set(adapters) == {*method_names(), "full"}
        for method in method_names():
            assert set(adapters[method]) == {"method", *settable(config_class(method.upper()))}
            assert not set(adapters[method]) & set(ELSEWHERE)
            assert all("default" in item for name, item in adapters[method].items() if name != "method")


class TestHints:
    def table(self) -> dict[str, list[str]]:
        text = Path(hints.__file__).with_name("hints.yaml").read_text(encoding="utf-8")
        names = re.findall(r"^(\w+):", text, re.MULTILINE)
        assert len(names) == len(set(names)), "a name twice"
        return yaml.safe_load(text)

    def test_names_are_not_ours(self) -> None:
        ours = {name.split(".")[-1] for name in leaves(smallest().model_dump())} | set(Recipe.model_fields)
        assert ours & set(self.table()) == {"train"}  # a field of `data`, but not a section

    def test_fields_exist(self) -> None:
        lora = {f"adapter.{name}" for name in ("method", *settable(config_class("LORA")))}
        known = {
            f"{name}.{field}" if name else field for name, cls in hints.sections().items() for field in cls.model_fields
        }
        known |= lora | {"adapter", "train", "eval"}
        for name, (_, here) in self.table().items():
            if " " not in here:
                assert here in known, name

    def test_advice(self) -> None:
        assert hints.hint(("data", "sequence_len")) == "`sequence_len` is axolotl's; here `data.max_length`"
        assert hints.hint(("training", "learning_rat")) == "did you mean `learning_rate`?"
        assert hints.hint(("model", "learning_rate")) == "`learning_rate` belongs in `training.learning_rate`"
        assert "known here: type, num_processes, num_machines, machine_rank" in str(hints.hint(("launcher", "zzz")))
        assert hints.hint(("data", "train", 0, "max_sample")) == "did you mean `max_samples`?"
