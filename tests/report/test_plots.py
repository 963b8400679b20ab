"""Loss curves from a log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftcli.report.plots import plot_losses

ROWS = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}, {"step": 4, "eval_loss": 2}]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], []])
def test_a_png_is_written(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    plot_losses(rows, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_equal_logs_give_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        plot_losses(ROWS, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    plot_losses(ROWS[:3], tmp_path / "c")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()
