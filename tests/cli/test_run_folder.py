"""Which folders a run may use, and what is in them after a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
        "data/audit.json",
        "checkpoint-3/y",
        "mine.txt",
    ):
        (folder / name).write_text(run_folder.FIRST_LINE if name == "recipe.yaml" else name)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/z").write_text("z")
    (folder / "checkpoint-9").symlink_to(tmp_path / "precious")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def recipe(folder: Path) -> str:
    """The recipe in a run folder, below its first line."""
    first, _, text = (folder / "recipe.yaml").read_text().partition("\n")
    assert first == run_folder.FIRST_LINE
    return text


def test_usable(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new", tmp_path / "empty"):
        run_folder.require_usable(folder, overwrite=False, resume=False)
    for options in ({"overwrite": True, "resume": False}, {"overwrite": False, "resume": True}):
        run_folder.require_usable(finished, **options)
    with pytest.raises(InputError, match=r"holds another run's work.*\n.*--resume auto.*--overwrite"):
        run_folder.require_usable(finished, overwrite=False, resume=False)


def test_a_run_that_trained_nothing_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(run_folder.FIRST_LINE + "\nmodel:\n")
    run_folder.require_usable(tmp_path, overwrite=False, resume=False)


@pytest.mark.parametrize("overwrite", [True, False])
def test_other_peoples_folders_are_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="no run wrote it"):
        run_folder.require_usable(tmp_path, overwrite=overwrite, resume=not overwrite)


def test_what_a_killed_run_was_about_to_write_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".tmp-0-123/data").mkdir(parents=True)
    (tmp_path / ".tmp-0-123-recipe.yaml").touch()
    run_folder.require_usable(tmp_path, overwrite=False, resume=True)
    (tmp_path / ".tmp-mine").mkdir()
    with pytest.raises(InputError, match="no run wrote it"):
        run_folder.require_usable(tmp_path, overwrite=True, resume=False)


def test_a_recipe_and_data_of_the_users_own_make_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("mine")
    for text in ("model: {}", f"{run_folder.FIRST_LINE}\nmodel: {{}}"):  # the second copied from a run
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(InputError, match="someone's own"):
            run_folder.require_usable(tmp_path, overwrite=True, resume=False)


@contextmanager
def installed(folder: Path, recipe: str = "another", *, overwrite: bool = False) -> Iterator[None]:
    with run_folder.prepared(folder) as made:
        (made / "data/new").touch()
        with run_folder.installed(made, folder, recipe, overwrite=overwrite):
            yield


def test_overwriting_removes_what_a_run_writes_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    with installed(finished, overwrite=True):
        left = {path for path in names(finished) if not path.startswith(".tmp-0-")}
    assert left == {
        "data",
        "recipe.yaml",
        "mine.txt",
        ".tmp-4-1",
    }  # a temporary folder is swept once its process is dead
    assert names(finished / "data") == {"new"}
    assert recipe(finished) == "another"
    assert (tmp_path / "precious/z").exists()


def test_nothing_is_left_of_a_refused_run(tmp_path: Path) -> None:
    folder = tmp_path / "a/b/run"
    with pytest.raises(InputError), run_folder.prepared(folder) as made:
        assert (made / "data").is_dir()
        raise InputError("no")
    assert not (tmp_path / "a").exists() and tmp_path.exists()


def test_nothing_is_left_of_a_run_that_is_refused_once_it_began(tmp_path: Path) -> None:
    """A base without one of its weights is found out by the worker."""
    folder = tmp_path / "a/run"
    with pytest.raises(InputError), installed(folder):
        (folder / "rank-0.log").touch()
        raise InputError("a weight is missing")
    assert not (tmp_path / "a").exists()
    with pytest.raises(InputError), installed(folder):
        (folder / "checkpoint-3").mkdir()  # a stream's bad row comes late
        raise InputError("no JSON")
    assert names(folder) == {"checkpoint-3", "data", "recipe.yaml"}


def test_a_disk_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"/x: could not be written \(No space left.*MB are free"), \
         run_folder.prepared(tmp_path / "run"):  # fmt: skip
        raise OSError(28, "No space left on device", "/x")


def test_a_refused_resume_changes_nothing(finished: Path) -> None:
    before = {path: path.read_text() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(InputError), installed(finished):
        assert recipe(finished) == "another"
        raise InputError("the batch size has changed")
    assert {path: path.read_text() for path in finished.rglob("*") if path.is_file()} == before


def test_a_resume_that_fails_later_keeps_what_it_wrote(finished: Path) -> None:
    with pytest.raises(RunError), installed(finished):
        raise RunError("out of memory")
    assert recipe(finished) == "another"
    assert names(finished / "data") == {"new"}
    assert not list(finished.glob(".tmp-0-*"))


def test_the_recipe_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "recipe.yaml").symlink_to(tmp_path / "victim")
    with installed(tmp_path, "theirs", overwrite=True):
        pass
    assert (tmp_path / "victim").read_text() == "mine" and recipe(tmp_path) == "theirs"
    assert not (tmp_path / "recipe.yaml").is_symlink()
