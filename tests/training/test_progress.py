"""What the screen shows, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from peftcli.training.progress import ProgressBar, peak_memory
from training.tiny import random_data, trainer

FIGURES = r"loss \d+\.\d{4}  lr \d\.\d\de-\d\d  grad \d+\.\d{3}  [\d,]+ tok/s  \d\.\d\d GB"


def show(folder: Path, *, terminal: bool) -> str:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=160, color_system=None)
    trainer(folder, eval_data=random_data(3), max_steps=4, eval_steps=2, logging_steps=2,
            callbacks=[ProgressBar(console)]).train()  # fmt: skip
    return screen.getvalue()


def test_plain_lines(tmp_path: Path) -> None:
    lines = show(tmp_path, terminal=False).splitlines()
    assert len(lines) == 4
    assert re.fullmatch(rf"step 2/4  {FIGURES}", lines[0])
    assert re.fullmatch(r"step 2/4  eval loss \d+\.\d{4}  perplexity \d+\.\d{4}  token accuracy \d+\.\d%", lines[1])
    assert "\x1b" not in "".join(lines)


def test_one_bar_on_a_terminal(tmp_path: Path) -> None:
    text = show(tmp_path, terminal=True)
    assert re.search(rf" 4/4 +{FIGURES}", text)
    assert text.count("eval loss") == 2


def test_the_bar_ends_when_the_run_fails(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    bar = ProgressBar(console)

    def interrupt() -> int:
        raise KeyboardInterrupt

    run = trainer(tmp_path, callbacks=[bar], received_signal=interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert bar.bar is not None
    assert not bar.bar.live.is_started


def test_peak_memory_is_in_bytes() -> None:
    assert 50e6 < peak_memory() < 1e12
