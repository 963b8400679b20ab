"""A user's folder: a tiny base, data and a recipe; and the command, run as the user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training.tiny import save_tiny_llama

from peftcli.cli import main

RECIPE = """
model: {name_or_path: base}
adapter: {method: lora, r: 4, target_modules: all-linear}
data: {train: train.jsonl, eval: {split: 0.25}}
training:
  output_dir: run
  per_device_train_batch_size: 2
  max_steps: 4
  eval_steps: 2
  save_steps: 2
  logging_steps: 1
"""


def peft(*arguments: str | Path, cwd: Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command; its exit code must be `code`, and it never shows a traceback."""
    done = subprocess.run(
        command_line(*arguments),
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr
    return done


def command_line(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "peftcli", *map(str, arguments)]


class Here:
    """The command in the test's own process, which has imported everything already."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def peft(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        """What the command wrote to stdout and stderr; its exit code must be `code`."""
        self._capsys.readouterr()
        found = main(arguments)
        out, err = self._capsys.readouterr()
        assert found == code, f"exit code {found}\n{out}\n{err}"
        return out, err


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    monkeypatch.chdir(place)
    return Here(capsys)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The user's folder."""
    save_tiny_llama(tmp_path / "base")
    rows = [{"prompt": f"what {number}", "completion": "fine thanks"} for number in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path
