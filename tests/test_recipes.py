"""Every recipe we ship is valid, and the quickstart's data is what README says it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peftcli.recipe.load import dump_recipe, load_recipe

PROJECT = Path(__file__).parents[1]
RECIPES = sorted((PROJECT / "recipes").rglob("*.yaml"))
DATA = PROJECT / "recipes" / "data"


def test_there_are_recipes() -> None:
    assert "quickstart.yaml" in [path.name for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_survives_being_resolved(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(resolved) == recipe


def messages(part: str) -> list[dict[str, str]]:
    """The conversations of one part as `{role: content}`."""
    lines = (DATA / f"quickstart-{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [{turn["role"]: turn["content"] for turn in json.loads(line)["messages"]} for line in lines]


def test_quickstart_data_is_what_the_script_writes(tmp_path: Path) -> None:
    script = PROJECT / "scripts" / "make_quickstart_data.py"
    subprocess.run([sys.executable, script, "--folder", tmp_path], check=True, capture_output=True, timeout=60)
    for part in ("train", "test"):
        name = f"quickstart-{part}.jsonl"
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_quickstart_holds_out_compositions_not_only_sentences() -> None:
    train, test = messages("train"), messages("test")
    assert not {item["user"] for item in train} & {item["user"] for item in test}
    assert not {item["assistant"] for item in train} & {item["assistant"] for item in test}

    def pairs(part: list[dict[str, str]]) -> set[tuple[str, ...]]:
        return {tuple(item["assistant"].split("@")[0].split()) for item in part}  # (verb, service)

    assert not pairs(train) & pairs(test)
    services = {service for _, service in pairs(train)}
    unseen = [item for item in test if item["assistant"].split("@")[0].split()[1] not in services]
    assert len(unseen) == len(test) // 2
