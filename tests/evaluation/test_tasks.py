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


def test_of_several_gold_answers_the_best_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SQuAD's rule, by hand: the model has learnt to answer with the colour alone."""
    recipe = make_run("QUESTION_ANS", tmp_path, max_steps=80)
    assert main(["train", str(recipe), "--no-audit"]) == 0, capsys.readouterr().err
    questions = [
        ("the cat is red the dog runs", ["cat is red", "red"]),  # exact by the second: 1 and 1
        ("the dog is green the bird runs", ["the dog is green", "is green"]),  # not exact; F1 of "is green": 2/3
        ("the bird is blue the cat runs", ["blue"]),  # 1 and 1
        ("the cat is red the dog runs", []),  # it has none, and the model says `red`: 0 and 0
    ]
    rows = [
        {
            "question": "what is it",
            "context": context,
            "answers": [{"text": text, "answer_start": context.index(text)} for text in golds],
        }
        for context, golds in questions
    ]
    (tmp_path / "gold.json").write_text(json.dumps([row | {"id": number} for number, row in enumerate(rows)]))
    for row in rows[3:]:
        row["answers"] = {"text": [], "answer_start": []}
    (tmp_path / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("gold.jsonl", "gold.json"):
        output = tmp_path / "results.json"
        assert main(["eval", str(recipe), "--data", str(tmp_path / name), "--output", str(output)]) == 0
        found = json.loads(output.read_text())
        assert [item["answers"]["tuned"] for item in found["items"]] == ["red", "green", "blue", "red"]
        assert found["items"][1]["expected"] == ["the dog is green", "is green"]
        values = {row["metric"]: row["adapters"]["tuned"]["value"] for row in found["metrics"]}
        assert values["qa_em"] == pytest.approx(2 / 4) and values["qa_f1"] == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)


def test_windows_of_a_long_context_are_one_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the run's own data and in a file; a gold answer that fits in no window is still what is expected."""
    recipe = make_run("QUESTION_ANS", tmp_path, max_steps=2)
    recipe.write_text(recipe.read_text().replace('"max_length": 64', '"max_length": 24, "overflow": "split"'))
    context = "the dog runs " * 10 + "the cat is red"
    golds = ["red", "the dog runs " * 8 + "the dog"]
    answers = [{"text": text, "answer_start": context.index(text)} for text in golds]
    row = {"question": "what is", "context": context, "answers": answers}
    (tmp_path / "eval.jsonl").write_text(json.dumps(row) + "\n" + (tmp_path / "eval.jsonl").read_text())
    assert main(["train", str(recipe), "--no-audit"]) == 0, capsys.readouterr().err
    own = ["--max-samples", "2"]
    for more in (own, [*own, "--data", str(tmp_path / "eval.jsonl")]):
        output = tmp_path / "results.json"
        assert main(["eval", str(recipe), *more, "--output", str(output)]) == 0
        assert "2 questions are asked in 4 windows" in " ".join(capsys.readouterr().err.split())
        found = json.loads(output.read_text())
        assert {row["metric"]: row["n"] for row in found["metrics"]} == {"loss": 4, "qa_em": 2, "qa_f1": 2}
        assert [item["expected"] for item in found["items"]] == [golds, ["red"]]
        assert [item["sample"] for item in found["items"]] == [0, 3]
        assert found["items"][0]["question"] == f"what is {context}"


def test_a_full_fine_tuning_is_compared_with_its_base_and_with_adapters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its numbers are those of the run's own evaluation; the base's are the same beside it as beside an adapter."""
    recipe = make_run("SEQ_CLS", tmp_path)
    for name, method in (("full", "{method: full}"), ("lora", "{method: lora, r: 8}")):
        arguments = [f"adapter={method}", "training.max_steps=20", "training.learning_rate=1e-2"]
        assert main(["train", str(recipe), "--no-audit", *arguments, "--output-dir", str(tmp_path / name)]) == 0
        assert "peft inspect" in capsys.readouterr().out
    rows = {}
    for given in (["full"], ["lora", "full"]):
        capsys.readouterr()
        output = tmp_path / "results.json"
        assert main(["eval", *(str(tmp_path / name) for name in given), "--output", str(output)]) == 0
        shown = capsys.readouterr()
        assert "was trained in full" in shown.err and "beside the base" in shown.err
        rows[len(given)] = {row["metric"]: row for row in json.loads(output.read_text())["metrics"]}
    trained = json.loads((tmp_path / "full/result.json").read_text())["metrics"]
    for metric, theirs in (("loss", "eval_loss"), ("accuracy", "eval_accuracy")):
        alone, both = rows[1][metric], rows[2][metric]
        assert alone["adapters"]["tuned"]["value"] == pytest.approx(trained[theirs], rel=1e-4)
        assert both["adapters"]["full"] == pytest.approx(alone["adapters"]["tuned"])
        assert both["base"]["value"] == alone["base"]["value"] != alone["adapters"]["tuned"]["value"]
        assert both["adapters"]["lora"]["value"] != both["base"]["value"]


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
