"""What `peft eval` refuses, and what it takes a run, an adapter and a recipe for."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftcli import LoraConfig
from peftcli.cli import main
from peftcli.errors import InputError
from peftcli.evaluation.panel import _columns
from peftcli.evaluation.subject import find_subject

RECIPE = """
model: {name_or_path: base, dtype: float32}
adapter: {method: METHOD}
data: {train: [{path: train.jsonl, columns: {prompt: q, completion: a}}], max_length: 99, loss_on: completion}
training: {output_dir: RUN}
"""


def write_recipe(path: Path, run: Path, method: str = "lora") -> Path:
    path.write_text(RECIPE.replace("METHOD", method).replace("RUN", str(run)), encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with an adapter's config and a checkpoint."""
    folder = tmp_path / "run"
    for where in (folder, folder / "checkpoint-5"):
        LoraConfig(base_model_name_or_path="some/base", target_modules=["q_proj"]).save_pretrained(where)
    write_recipe(folder / "recipe.yaml", folder)
    return folder


def test_run_checkpoint_and_recipe_are_found(run: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "mine.yaml", run)
    for given, adapter in ((run, run), (run / "checkpoint-5", run / "checkpoint-5"), (recipe, run)):
        subject = find_subject(str(given))
        assert (subject.adapter, subject.run) == (adapter, run)
        assert subject.model.dtype == "float32"
        assert subject.recipe is not None and subject.recipe.data.max_length == 99


def test_an_adapter_alone_names_its_base(run: Path) -> None:
    (run / "recipe.yaml").unlink()
    subject = find_subject(str(run))
    assert (subject.model.name_or_path, subject.recipe) == ("some/base", None)
    assert find_subject(str(run), base="other/base").model.name_or_path == "other/base"
    LoraConfig(target_modules=["q_proj"]).save_pretrained(run)
    with pytest.raises(InputError, match="--base"):
        find_subject(str(run))
    LoraConfig(base_model_name_or_path="some/base", task_type="SEQ_CLS").save_pretrained(run)
    with pytest.raises(InputError, match="was trained for SEQ_CLS"):
        find_subject(str(run), base="other/base")


def test_another_file_is_read_as_the_training_data_was(run: Path) -> None:
    section = find_subject(str(run))._section("test.jsonl", None, 7)
    [source] = section.train
    assert (source.columns, source.max_samples) == ({"prompt": "q", "completion": "a"}, 7)
    assert (section.max_length, section.loss_on, section.eval) == (99, "completion", None)
    [source] = find_subject(str(run))._section("test.jsonl", "chat", None).train
    assert (source.columns, source.format) == (None, "chat")
    with pytest.raises(InputError, match="did you mean `chat`"):
        find_subject(str(run))._section("test.jsonl", "chta", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "exactmatch"], "did you mean `exact_match`"),
        (["--metrics", ""], "is not a metric"),
        (["--fail-under", "exact_match"], "names no number"),
        (["--fail-under", "exact_match=nan"], "names no number"),
        (["--fail-under", "bleu=0.5"], "'bleu' is not a metric"),
        (["--output", "nowhere/results.json"], "no such folder"),
        (["--metrics", "regex"], "--regex PATTERN"),
        (["--regex", "(", "--metrics", "loss"], "no regular expression"),
        (["--report", "."], "is no part of a report"),
        (["--max-samples", "0"], "--max-samples"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(run: Path, capsys, arguments, message) -> None:
    assert main(["eval", str(run), *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err and not shown.out


def test_what_is_no_adapter_is_refused(run: Path, tmp_path: Path, capsys) -> None:
    recipe = write_recipe(tmp_path / "mine.yaml", tmp_path / "untrained")
    full = write_recipe(tmp_path / "full.yaml", run, "full")
    write_recipe(run / "recipe.yaml", run, "full")
    for given, message in (
        (tmp_path, "no adapter here"),
        (recipe, "train it first"),
        (full, "no model here: no config.json"),
        (run / "checkpoint-5", "its checkpoints are for resuming"),
    ):
        assert main(["eval", str(given)]) == 2
        assert message in capsys.readouterr().err


def test_columns_are_as_short_as_can_be() -> None:
    assert _columns(["out/a"]) == ["tuned"]
    assert _columns(["out/a", "out/b/"]) == ["a", "b"]
    assert _columns(["x/run", "y/run", "z"]) == ["x/run", "y/run", "z"]
    assert _columns(["run/checkpoint-5", "run"]) == ["checkpoint-5", "run"]
    assert "base" not in _columns(["base", "b"])
