"""A run's model is counted, and refused, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftcli.errors import InputError
from peftcli.recipe.schema import Recipe
from peftcli.training.outline import outline

from .tiny import tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")  # looked for, not read
    return folder


def recipe(base: Path, adapter: dict[str, Any], **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name_or_path": str(base)},
            "adapter": adapter,
            "data": {"train": "x.jsonl"},
            "training": {"output_dir": "/tmp/x", **training},
        }
    )


def test_lora(base: Path) -> None:
    found = outline(recipe(base, {"method": "lora", "r": 2, "target_modules": ["q_proj", "down_proj"]}))
    assert found.dtype == "float32" and found.parameters == tiny_llama().num_parameters()
    assert found.adapted == 4 and found.linear == 15
    assert found.trainable == 2 * (2 * (16 + 16) + 2 * (32 + 16))


def test_a_start_from_the_base_needs_no_weights(base: Path) -> None:
    found = outline(recipe(base, {"method": "lora", "init_lora_weights": "pissa", "target_modules": "all-linear"}))
    assert found.adapted == 14


def test_full(base: Path) -> None:
    found = outline(recipe(base, {"method": "full"}))
    assert found.trainable == found.parameters and found.adapted == 0


@pytest.mark.parametrize(
    ("adapter", "training", "message"),
    [
        ({"method": "lora", "target_modules": ["nope"]}, {}, r"adapter.target_modules: .*\n  allowed: .*q_proj"),
        ({"method": "full"}, {"loraplus_lr_ratio": 16.0}, "training.loraplus_lr_ratio"),
    ],
)
def test_what_does_not_fit_is_refused(
    base: Path, adapter: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        outline(recipe(base, adapter, **training))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_means_nothing_is_told(base: Path, field: str) -> None:
    adapter = {"method": "lora", "target_modules": ["q_proj"], field: {"q_proj": 2, "layers.1.q_proj": 3, "k_proj": 2}}
    with pytest.warns(UserWarning) as said:
        outline(recipe(base, adapter))
    found = [str(warning.message) for warning in said if "adapted" in str(warning.message)]
    assert found == [
        f"adapter.{field}: `{key}` matches no module that is adapted" for key in ("layers.1.q_proj", "k_proj")
    ]
