"""`peft merge` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from merging.lab import save_adapter, save_base

from cli.conftest import peft


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    root = save_base(folder / "base")
    for index, name in enumerate("ab"):
        save_adapter(folder / name, root, r=4, seed=index)
    return folder


def test_merge_on_screen(adapters: Path, tmp_path: Path) -> None:
    done = peft(
        *("merge", adapters / "a", adapters / "b", "-o", "m", "--method", "ties", "--density", "0.2"),
        *("--weights", "-0.5,0.5", "--plot", "m.png"),
        cwd=tmp_path,
    )
    assert "ties in delta space" in done.stdout
    assert "energy kept" in done.stdout
    assert "sign conflicts" in done.stdout
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "merge.json")
    ]
    assert peft("inspect", "m", "--check", cwd=tmp_path, code=0)


def test_merge_as_json(adapters: Path, tmp_path: Path) -> None:
    done = peft(
        *("merge", adapters / "a", adapters / "b", "-o", "m", "--weights", "1", "--weights", "2", "--json"),
        cwd=tmp_path,
    )
    report = json.loads(done.stdout)
    assert [parent["weight"] for parent in report["parents"]] == [1, 2]
    assert report["energy"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--weights", "a,b"], "--weights"),
        (["--weights", "1", "2"], "does not exist"),
        (["--space", "beta"], "delta, factors"),
        (["--rank", "-3"], "--rank"),
        (["--base", "no/such/base/anywhere"], "no/such/base"),
        (["--method", "ties"], "--density"),
        (["--plot", "m.xyz"], "is no picture"),
        (["--plot", "nowhere/m.png"], "no such folder"),
    ],
)
def test_bad_options(adapters: Path, tmp_path: Path, options: list[str], problem: str) -> None:
    done = peft("merge", adapters / "a", adapters / "b", "-o", "m", *options, cwd=tmp_path, code=2)
    assert problem in done.stderr
    assert not list(tmp_path.iterdir())
