"""Running a sweep: one `peft train` after another, each in a process of its own, each resumable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftcli.cli import run_folder
from peftcli.errors import InputError, RunError, printable
from peftcli.files import read_bounded, read_strict_json, write_atomically
from peftcli.launchers.run import passing_signals_on
from peftcli.recipe.load import dump_recipe
from peftcli.recipe.yaml12 import MAX_BYTES_READ
from peftcli.sweep.grid import Combination, Grid
from peftcli.training.checkpoints import remove

RESULT = "result.json"
WEIGHTS = ("adapter_model.safetensors", "model*.safetensors")
LAST_LINES = 3

NEW, PARTIAL, DONE, FAILED = "not run yet", "interrupted", "done", "failed"
"""States of a run."""

Watch = Callable[[str], None]
"""Called with each line a run writes."""


@dataclass
class Run:
    """A combination and what became of it.

    Attributes:
        state: one of the states above.
        reason: why it failed, in its own words.
        trainable: parameters that are trained; None until it is known.
        result: the run's `result.json`.
    """

    combination: Combination
    folder: Path
    state: str = NEW
    reason: str = ""
    trainable: int | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.combination.name

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe it is started with, beside its folder."""
        return self.folder.with_name(f"{self.name}.yaml")

    @property
    def log(self) -> Path:
        """Everything it wrote to the screen."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    def metrics(self) -> dict[str, float]:
        return self.result.get("metrics") or {}

    @property
    def file_bytes(self) -> int | None:
        """Size of the weights it left."""
        sizes = [path.stat().st_size for pattern in WEIGHTS for path in self.folder.glob(pattern)]
        return sum(sizes) if sizes and self.state == DONE else None


def find_runs(grid: Grid, *, overwrite: bool) -> list[Run]:
    """Every combination with the state its folder is in.

    Raises:
        InputErrors: a folder holds something else: another recipe's run, or one on data that has changed since.
    """
    runs = [Run(combination, grid.folder / combination.name) for combination in grid.combinations]
    for run in runs:
        run_folder.require_usable(run.folder, overwrite=overwrite, resume=True)
        if not overwrite:
            _look_at(run)
    return runs


def forget(run: Run) -> None:
    """Remove what an earlier run left, for `--overwrite`: a sweep that is stopped then goes on without it."""
    for path in (run.folder, run.recipe_file, run.log):
        remove(path)


def _look_at(run: Run) -> None:
    """Find out how far a run has come.

    What it was started with is compared, not the run folder's own recipe: that names the classes of its data, too.
    """
    if not (run.folder / run_folder.RECIPE).is_file():
        return
    started = read_bounded(run.recipe_file, MAX_BYTES_READ) if run.recipe_file.is_file() else b""
    if started.decode("utf-8", "replace") != dump_recipe(run.combination.recipe):
        raise InputError(
            "holds the run of another recipe: what is not swept has changed since",
            place=run.folder,
            fix="--overwrite to run all again, or --output-dir DIR",
        )
    result = run.folder / RESULT
    if not result.is_file():
        run.state = PARTIAL
        return
    if changed := _changed_since(run.combination, result.stat().st_mtime):
        raise InputError(
            f"was run before {changed} changed",
            place=run.folder,
            fix="--overwrite to run all again, or --output-dir DIR",
        )
    run.state, run.result = DONE, read_strict_json(result)


def _changed_since(combination: Combination, when: float) -> Path | None:
    """A data file that is newer than `when`."""
    data = combination.recipe.data
    for source in (*data.train, *(data.eval if isinstance(data.eval, tuple) else ())):
        path = Path(source.path)
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file() and file.stat().st_mtime > when:
                return file
    return None


def carry_out(run: Run, *, launcher_arguments: Sequence[str], audit: bool = True, watch: Watch) -> None:
    """Start or continue a run and wait for it; its state and result are known afterwards.

    Raises:
        RunError: we were told to stop. The run was, too, and has saved its work.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(run.recipe_file, dump_recipe(run.combination.recipe))
    command = [sys.executable, "-m", "peftcli", "train", str(run.recipe_file)]
    command += ["--resume", "auto"] if run.state == PARTIAL else []
    command += [] if audit else ["--no-audit"]
    command += ["--", *launcher_arguments] if launcher_arguments else []
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # else a terminal's Ctrl-C would reach it twice
    )
    with process, run.log.open("w", encoding="utf-8") as log, passing_signals_on(process.send_signal) as received:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            watch(line.rstrip("\n"))
        code = process.wait()
    if code == 0:
        run.state, run.result, run.reason = DONE, read_strict_json(run.folder / RESULT), ""
    elif received:
        run.state = PARTIAL
        name = signal.Signals(received[0]).name
        error = RunError(f"stopped by {name}; the same command (without --overwrite) goes on from here")
        error.exit_code = 128 + received[0]
        raise error
    else:
        run.state, run.reason = FAILED, _reason(run.log, code)


def _reason(log: Path, code: int) -> str:
    """What a failed run said last: its error, if it told one."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    said = lines[errors[-1] :] if errors else lines
    shown = " ".join(line.strip() for line in said[-LAST_LINES:]).removeprefix("error: ")
    return printable(shown, 500) or f"exit code {code}"
