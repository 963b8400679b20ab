"""Promises about the project as a whole that no single module's tests can keep."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peftcli

PROJECT = Path(__file__).parents[1]
PACKAGE = PROJECT / "peftcli"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent.relative_to(PROJECT).as_posix() for path in SOURCES} - {"peftcli"})
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def imported(path: Path) -> set[str]:
    """Top-level names of the packages a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_the_engine_is_our_own() -> None:
    assert [path for path in SOURCES if "peft" in imported(path)] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_readme_tells_what_each_folder_is_for(folder: str) -> None:
    assert re.search(rf"^\| `{re.escape(folder)}/` +\| \S.*\|$", README, re.M), f"README has no line for {folder}/"


def test_readme_names_no_folder_that_is_not_there() -> None:
    named = re.findall(r"^\| `([\w./-]+)/` +\|", README, re.M)
    assert named and [folder for folder in named if not (PROJECT / folder).is_dir()] == []


def test_readme_shows_the_quickstart_recipe_as_it_is() -> None:
    assert (PROJECT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8").strip() in README


def test_every_promise_names_tests_that_are_there() -> None:
    rows = README.partition("## What is promised")[2].partition("\n## ")[0]
    promises = [row for row in rows.splitlines() if row.startswith("| ")][1:]
    assert len(promises) > 10
    for promise in promises:
        tests = re.findall(r"`(tests/[\w./]+\.py)`", promise)
        assert tests, promise
        for test in tests:
            assert "def test_" in (PROJECT / test).read_text(encoding="utf-8"), test


def test_changelog_begins_with_this_version() -> None:
    changelog = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = re.search(r"^## (\S+)", changelog, re.M)
    assert heading and heading.group(1) == peftcli.__version__


HEAVY = "torch transformers accelerate datasets numpy matplotlib"


@pytest.mark.parametrize("arguments", ["--help", "train --help", "eval --help", "inspect --help", "train --schema"])
def test_help_needs_nothing_heavy(arguments: str) -> None:
    program = (
        "import sys\n"
        "from peftcli.cli import main\n"
        f"code = main({arguments.split()!r})\n"
        f"print('loaded:', *(name for name in {HEAVY.split()!r} if name in sys.modules))\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
