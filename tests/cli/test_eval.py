"""`peft eval` as a user types it, on a tiny base with adapters that were never trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from cli.conftest import Here, peft
from peftcli import LoraConfig, get_peft_model
from peftcli.report.folder import FILES


@pytest.fixture
def adapters(place: Path) -> Path:
    """A user's folder with a tiny base, two adapters of it in `out/`, one of another base, and data."""
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    for name, base in (("one", "base"), ("two", "base"), ("other", "elsewhere")):
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
        config.base_model_name_or_path = base
        adapted.save_pretrained(place / "out" / name)
        model = adapted.unload()
    return place


def test_several_adapters_in_one_run(adapters: Path) -> None:
    """As a user types it: a table, a report and a threshold that one of them misses."""
    arguments = [
        "out/one",
        "out/two",
        "--data",
        "train.jsonl",
        "--metrics",
        "loss,exact_match",
        "--max-new-tokens",
        "4",
    ]
    shown = peft("eval", *arguments, "--report", "report", "--fail-under", "loss=0.1", cwd=adapters, code=1)
    assert ["metric", "n", "base", "one", "two"] in [line.split() for line in shown.stdout.splitlines()]
    assert "loss of one is" in shown.stderr and "loss of two is" in shown.stderr
    results = json.loads((adapters / "report" / "results.json").read_text())
    assert results["adapters"] == {"one": "out/one", "two": "out/two"} and results["samples"] == 16
    loss = results["metrics"][0]
    assert loss["adapters"]["one"]["delta"] == pytest.approx(loss["adapters"]["one"]["value"] - loss["base"]["value"])
    assert {path.name for path in (adapters / "report").iterdir()} == {*FILES}


def test_adapters_that_can_not_be_compared_are_refused(adapters: Path, here: Here) -> None:
    for arguments, message in (
        (["out/one", "out/other"], "has another base than out/one: elsewhere, not base"),
        (["out/one", "out/one"], "is named twice"),
        (["out/one", "out/two"], "--data FILE"),
    ):
        assert message in here.peft("eval", *arguments, code=2)[1]
