"""A folder with a base model, data and a way to write recipes into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

MINIMAL = """\
model:
  name_or_path: base
adapter:
  method: lora
  r: 4
  target_modules: [q_proj]
data:
  train: train.jsonl
training:
  output_dir: out/run
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe's folder; the current folder is another one."""
    (tmp_path / "base").mkdir()
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[..., Path]:
    """Writes a recipe: the minimal one with pieces of its text replaced."""

    def write(*changes: tuple[str, str], add: str = "", name: str = "recipe.yaml") -> Path:
        text = MINIMAL
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (folder / name).write_text(text + add)
        return folder / name

    return write
