"""Each task's recipe, with a tiny base and tiny data in the place of its own: trained as it stands otherwise."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tasks import TASKS, make_run

from peftcli.cli import main

RECIPES = {
    "classify-intents": "SEQ_CLS",
    "tag-entities": "TOKEN_CLS",
    "answer-squad": "QUESTION_ANS",
    "embed-pairs": "FEATURE_EXTRACTION",
    "summarize-t5": "SEQ_2_SEQ_LM",
    "dpo": "dpo",
}
FOLDER = Path(__file__).parents[1] / "recipes"


def test_every_task_has_a_recipe() -> None:
    assert {*RECIPES.values(), "orpo"} == set(TASKS)  # dpo.yaml names orpo


@pytest.mark.parametrize("name", RECIPES)
def test_the_shrunken_twin_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(RECIPES[name], tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = FOLDER / f"{name}.yaml"
    sizes = ["model.name_or_path=base", "data.train=train.jsonl", "data.eval=eval.jsonl", "data.max_length=64"]
    text = f"extends: {json.dumps(os.path.relpath(recipe, tmp_path))}\n"
    (tmp_path / "twin.yaml").write_text(text)
    assert main(["train", "twin.yaml", *sizes, "training.max_steps=2", "training.output_dir=out", "--no-audit"]) == 0
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
