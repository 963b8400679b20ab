"""`peft eval` on every task: its numbers are those of the run's own evaluation, and what is predicted is said in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tasks import make_run

from peftcli.cli import main

SAME = {
    "SEQ_CLS": {"loss": "eval_loss", "accuracy": "eval_accuracy"},
    "TOKEN_CLS": {"loss": "eval_loss", "token_accuracy": "eval_token_accuracy", "span_f1": "eval_span_f1"},
    "QUESTION_ANS": {"loss": "eval_loss"},
    "FEATURE_EXTRACTION": {"loss": "eval_loss"},
    "SEQ_2_SEQ_LM": {"loss": "eval_loss", "perplexity": "eval_perplexity"},
    "dpo": {},
}
"""Metrics of `peft eval` and the run's own names for them."""


@pytest.mark.parametrize("name", SAME)
def test_every_task_is_scored(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_run(name, tmp_path)
    assert main(["train", str(recipe), "--no-audit"]) == 0, capsys.readouterr().err
    trained = json.loads((tmp_path / "run/result.json").read_text())["metrics"]
    output = tmp_path / "results.json"
    more = ["--metrics", "loss,perplexity,exact_match,stop_rate"] if name == "SEQ_2_SEQ_LM" else []
    assert main(["eval", str(recipe), "--output", str(output), *more]) == 0, capsys.readouterr().err
    found = json.loads(output.read_text())
    metrics = {row["metric"]: row for row in found["metrics"]}
    for ours, theirs in SAME[name].items():
        assert metrics[ours]["adapters"]["tuned"]["value"] == pytest.approx(trained[theirs], rel=1e-4), ours
    assert metrics["loss"]["adapters"]["tuned"]["delta"] < 0 and metrics["loss"]["n"] == 6
    best = [row["adapters"]["tuned"]["value"] for metric, row in metrics.items() if row["higher_is_better"]]
    assert best and min(best) > 0.6
    right = [item for item in found["items"] if item["answers"]["tuned"] == item["expected"][0]]
    assert len(found["items"]) == 6 and len(right) >= 3 and all(item["question"] for item in found["items"])


def test_two_classifiers_share_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their heads are their own; the same numbers come from each alone, and from a file instead of the run's data."""
    recipe = make_run("SEQ_CLS", tmp_path)
    for seed in ("1", "2"):
        arguments = [f"training.seed={seed}", "training.max_steps=10", "--output-dir", str(tmp_path / f"run{seed}")]
        assert main(["train", str(recipe), "--no-audit", *arguments]) == 0, capsys.readouterr().err
    runs = [str(tmp_path / f"run{seed}") for seed in "12"]
    results = {}
    for name, given in (("both", runs), ("first", runs[:1]), ("second", runs[1:])):
        output = tmp_path / f"{name}.json"
        data = ["--data", str(tmp_path / "eval.jsonl")]
        assert main(["eval", *given, *data, "--output", str(output)]) == 0, capsys.readouterr().err
        results[name] = {row["metric"]: row for row in json.loads(output.read_text())["metrics"]}
    for column, name in (("run1", "first"), ("run2", "second")):
        for metric, row in results["both"].items():
            alone = results[name][metric]["adapters"]["tuned"]["value"]
            assert row["adapters"][column]["value"] == pytest.approx(alone, rel=1e-5), metric
            assert row["base"]["value"] == pytest.approx(results[name][metric]["base"]["value"], rel=1e-5)
    assert main(["eval", *runs, "--metrics", "exact_match"]) == 2
    assert "is no metric of this task" in capsys.readouterr().err
