"""Expressions from files: those that can take exponential time are refused before they run, honest ones are not."""

from __future__ import annotations

import pytest

from peftcli.adapters.expressions import expression_fault, fullmatch
from peftcli.adapters.targets import MAX_EXPRESSIONS, pattern_value
from peftcli.errors import InputError

HONEST = [
    r".*\.(q_proj|v_proj)",
    r"(\w+\.)*q_proj",
    r"model\.layers\.(\d+)\.self_attn\.[qkv]_proj",
    r"(?:.*\.)?layers\.(?:[0-9]|1[0-5])\..*",
    r"(?!.*vision).*\.(?:down|up)_proj",
    r"(.*\.)?(q_proj)",
    r"[a-z_.0-9]+",
    r"(a{2,3})+",
    "",
]
EXPONENTIAL = [
    r"(([a-z_.0-9])+)+X",
    r"(a+)+b",
    r"(a*)*b",
    r"(a+b?)+c",
    r"(\w+|x)+y",
    r"(?:(?:a+))+?b",
    r"((a{1,})+)+b",
    r"(?=(a+)+b)a",
    r"x(y(z+)*)?",
]
BROKEN = ["(", "[a", "*", r"\1", "a)|(b", "(?P<n>a", "(" * 5000 + ")" * 5000]


@pytest.mark.parametrize("pattern", HONEST)
def test_honest(pattern: str) -> None:
    assert expression_fault(pattern) is None


@pytest.mark.parametrize("pattern", EXPONENTIAL)
def test_exponential(pattern: str) -> None:
    with pytest.raises(InputError, match="exponential time") as caught:
        fullmatch(pattern, "model.layers.0.self_attn.q_proj", field="exclude_modules")
    assert caught.value.field == "exclude_modules"


@pytest.mark.parametrize("pattern", BROKEN)
def test_broken(pattern: str) -> None:
    with pytest.raises(InputError, match="is not a regular expression"):
        fullmatch(pattern, "q_proj", field="target_modules")


def test_a_long_expression_is_judged_quickly() -> None:
    assert expression_fault("(" + "a" * 20_000 + ")+") is None
    assert expression_fault("|".join(f"layers.{i}.q_proj" for i in range(2_000))) is None


def test_an_endless_expression() -> None:
    with pytest.raises(InputError, match="100,000 characters"):
        fullmatch("a" * 100_000, "q_proj", field="target_modules")


def test_a_pattern_of_plain_names_needs_no_expressions() -> None:
    names = {f"model.layers.{i}.q_proj": i + 1 for i in range(20_000)}
    assert pattern_value(names, "model.layers.19999.q_proj", 0) == 20_000
    assert pattern_value({"q_proj": 2, r".*v_proj": 3}, "a.v_proj", 0) == 3
    assert pattern_value({"q.proj": 2}, "a.q_proj", 0) == 2  # as in PEFT, a dot is any character


def test_too_many_expressions() -> None:
    many = {f"x{i}.*": 1 for i in range(MAX_EXPRESSIONS + 1)}
    with pytest.raises(InputError, match="more than"):
        pattern_value(many, "q_proj", 0)
