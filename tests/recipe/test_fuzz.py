"""Whatever a recipe holds, the loader gives a recipe or an InputError, and dumping is faithful."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftcli.errors import InputError
from peftcli.recipe import yaml12
from peftcli.recipe.load import dump_recipe, load_recipe
from peftcli.recipe.nodes import Origin

from .conftest import MINIMAL

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["auto", "lora", "1e-4", "010", "~", "all-linear", "no", "/", ".", "train.jsonl"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
pieces = st.sampled_from(
    [
        "a",
        ": ",
        "- ",
        "\n",
        "  ",
        "\t",
        "[",
        "]",
        "{",
        "}",
        ",",
        '"',
        "'",
        "#",
        "&x ",
        "*x",
        "!t ",
        "|",
        ">",
        "%",
        "---",
        "?",
        "<<",
        "1e5",
        "\\",
        "é",
        "\x00",
        "\x85",
        "\ud800",
    ]
)


@FUZZ
@given(
    st.binary(max_size=200)
    | st.lists(pieces, max_size=40).map(lambda parts: "".join(parts).encode("utf-8", "surrogatepass"))
)
def test_any_bytes(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(raw)
    with pytest.raises(InputError):
        load_recipe(path)


@FUZZ
@given(st.data())
def test_any_value_in_any_field(folder: Path, data: st.DataObject) -> None:
    recipe = yaml.safe_load(MINIMAL)
    recipe["training"] |= {"learning_rate": 1e-4, "lr_scheduler_kwargs": {}, "report_to": []}
    recipe |= {"launcher": {"num_processes": 1}, "quantization": None}
    spots = [(recipe, name) for name in recipe]
    spots += [(section, name) for section in recipe.values() if isinstance(section, dict) for name in section]
    holder, name = data.draw(st.sampled_from(spots))
    holder[name] = data.draw(values)
    check(folder, yaml.dump(copy.deepcopy(recipe), allow_unicode=True).encode("utf-8", "surrogatepass"))


@FUZZ
@given(
    st.sampled_from(
        ["training.run_name", "adapter.r", "data.train", "data.eval", "adapter", "model.x.y", "data.train.0"]
    ),
    st.text(max_size=20),
)
def test_any_override(folder: Path, name: str, value: str) -> None:
    check(folder, MINIMAL.encode(), f"{name}={value}")
    check(folder, MINIMAL.encode(), f"~{name}{value}")


@FUZZ
@given(st.text())
def test_any_text_survives_a_dump(folder: Path, text: str) -> None:
    encoded = yaml.dump({"training": {"run_name": text}}, default_style='"')
    (folder / "base.yaml").write_text(MINIMAL)
    check(folder, f"extends: base.yaml\n{encoded}".encode("utf-8", "surrogatepass"))


@FUZZ
@given(st.text(alphabet="0123456789.eE+-_xobainftrulsNTF~:", max_size=8))
def test_resolve_agrees_with_parse(text: str) -> None:
    """A plain scalar means the same typed as an override and written in a file."""
    try:
        typed: object = yaml12.resolve(text)
    except ValueError:
        typed = InputError
    try:
        node = yaml12.parse(f"[{text}]", Origin("x", Path()))
    except InputError:
        return  # more than a plain scalar in YAML, or refused alike
    written = node.plain() if node else None
    assert repr(written) == repr([typed]) or (text == "" and written == []) or isinstance(written[0], dict)  # type: ignore[index]


def check(folder: Path, raw: bytes, *overrides: str) -> None:
    path = folder / f"fuzz-{os.getpid()}.yaml"
    path.write_bytes(raw)
    try:
        recipe = load_recipe(path, overrides)
    except InputError as error:
        assert len(str(error)) < 40_000
        assert not any(character < " " and character not in "\n\t" for character in str(error))
        return
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
