"""Which folders a run may use, and what is in them after a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftcli.cli import run_folder
from peftcli.errors import InputError, RunError


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a finished run, with a note the user keeps there and a link out of it."""
    folder = tmp_path / "run"
    for name in ("data", "checkpoint-3", ".tmp-4-1"):
        (folder / name).mkdir(parents=True)
    for name in (
        "recipe.yaml",
        "adapter_model.safetensors",
        "log.jsonl",
        "rank-1.log",
        "data/x",
        "checkpoint-3/y",
        "mine.txt",
    ):
        (folder / name).write_text(name)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/z").write_text("z")
    (folder / "checkpoint-9").symlink_to(tmp_path / "precious")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_usable(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new", tmp_path / "empty"):
        run_folder.require_usable(folder, overwrite=False, resume=False)
    for options in ({"overwrite": True, "resume": False}, {"overwrite": False, "resume": True}):
        run_folder.require_usable(finished, **options)
    with pytest.raises(InputError, match=r"holds another run's work.*\n.*--resume auto.*--overwrite"):
        run_folder.require_usable(finished, overwrite=False, resume=False)


def test_a_run_that_trained_nothing_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    run_folder.require_usable(tmp_path, overwrite=False, resume=False)


@pytest.mark.parametrize("overwrite", [True, False])
def test_other_peoples_folders_are_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="no run wrote it"):
        run_folder.require_usable(tmp_path, overwrite=overwrite, resume=not overwrite)


def test_clear_removes_what_a_run_writes_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    run_folder.clear(finished)
    assert names(finished) == {"data", "mine.txt"}
    assert (tmp_path / "precious/z").exists()


def test_nothing_is_left_of_a_refused_run(tmp_path: Path) -> None:
    folder = tmp_path / "a/b/run"
    with pytest.raises(InputError), run_folder.created(folder):
        assert (folder / "data").is_dir()
        raise InputError("no")
    assert not (tmp_path / "a").exists() and tmp_path.exists()


def test_a_disk_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="/x: No space left"), run_folder.created(tmp_path / "run"):
        raise OSError(28, "No space left on device", "/x")


def test_a_refused_resume_changes_nothing(finished: Path) -> None:
    before = {path: path.read_text() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(InputError), run_folder.kept_if_refused(finished), run_folder.created(finished):
        run_folder.write_recipe(finished, "another")
        (finished / "data/new").touch()
        raise InputError("the batch size has changed")
    assert {path: path.read_text() for path in finished.rglob("*") if path.is_file()} == before


def test_a_resume_that_fails_later_keeps_what_it_wrote(finished: Path) -> None:
    with pytest.raises(RunError), run_folder.kept_if_refused(finished), run_folder.created(finished):
        run_folder.write_recipe(finished, "another")
        raise RunError("out of memory")
    assert (finished / "recipe.yaml").read_text() == "another"
    assert not list(finished.glob(".tmp-0-*"))


def test_the_recipe_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "recipe.yaml").symlink_to(tmp_path / "victim")
    run_folder.write_recipe(tmp_path, "theirs")
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "recipe.yaml").read_text() == "theirs"
    assert names(tmp_path) == {"victim", "recipe.yaml"}
