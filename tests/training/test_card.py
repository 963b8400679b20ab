"""The card says what was done, and nothing a file's name wants it to say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftcli.recipe.schema import Recipe
from peftcli.training.card import model_card

REPORT = {
    "train": {
        "samples": 1200,
        "tokens": 34567,
        "supervised_tokens": 8901,
        "sources": [{"path": "/home/me/train.jsonl"}],
    }
}
METRICS = {"eval_loss": 0.25, "eval_perplexity": 1.284, "eval_token_accuracy": 0.9}


def recipe(base: str = "org/Base-1B", folder: str = "out/my-run", **adapter: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name_or_path": base},
            "adapter": adapter or {"method": "lora", "r": 16, "lora_alpha": 32},
            "data": {"train": "train.jsonl"},
            "training": {"output_dir": folder, "run_name": "api_key=verysecretvalue"},
        }
    )


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_facts() -> None:
    card = model_card(recipe(), REPORT, METRICS, 40)
    assert front_matter(card) == {
        "library_name": "peft",
        "base_model": "org/Base-1B",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "peftcli", "base_model:adapter:org/Base-1B"],
    }
    for text in ("| samples | 1,200 |", "| supervised tokens | 8,901 |", "| r | 16 |", "| loss | 0.2500 |",
                 "| saved step | 40 |", 'PeftModel.from_pretrained(base, "path/to/this/folder")', "`train.jsonl`"):  # fmt: skip
        assert text in card
    assert "/home/me" not in card
    assert card == model_card(recipe(), REPORT, METRICS, 40)


def test_a_local_base_does_not_tell_where_it_lay() -> None:
    card = model_card(recipe("/home/me/secret-project/tiny"), REPORT, None, 4)
    assert front_matter(card)["base_model"] == "tiny"
    assert "/home/me" not in card
    assert "## Evaluation" not in card


def test_the_whole_model() -> None:
    card = model_card(recipe(method="full"), REPORT, METRICS, 4)
    assert front_matter(card)["library_name"] == "transformers"
    assert "PeftModel" not in card


HOSTILE = [
    "x\nlicense: mit\ntags: [evil]",
    'x"\n---\n# Injected',
    "x`](javascript:alert(1)) <script>alert(1)</script> ![p](http://evil)",
    "x | y | z",
    "x\x1b[31m\u202egnp",
    "{x: 1}",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_only_names(name: str) -> None:
    report = json.loads(json.dumps(REPORT))
    report["train"]["sources"][0]["path"] = name
    card = model_card(recipe(f"/models/{name}", f"out/{name}"), report, METRICS, 4)
    assert set(front_matter(card)) == {"library_name", "base_model", "pipeline_tag", "tags"}
    assert card.count("\n---\n") == 1
    body = card.split("\n---\n", 1)[1]
    assert [line for line in body.splitlines() if line.startswith("#")][1:] == [
        "## Training", "## Evaluation", "## Use", "### Framework versions",
    ]  # fmt: skip
    assert "\x1b" not in card
    assert "\u202e" not in card
    for line in body.splitlines():
        if line.startswith("| ") and line != "| | |":
            assert line.count("|") == 3
    outside_code = "".join(part for number, part in enumerate(body.replace("```", "`").split("`")) if number % 2 == 0)
    assert "<script>" not in outside_code
    assert "](javascript" not in outside_code


def test_a_real_cards_yaml_is_read_by_the_hub(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    (tmp_path / "README.md").write_text(model_card(recipe(), REPORT, METRICS, 4))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/Base-1B"
