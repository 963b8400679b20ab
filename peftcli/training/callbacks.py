"""What happens around the loop: early stopping, the log file, trackers. The loop itself knows none of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.errors import InputError
from peftcli.files import write_atomically

if TYPE_CHECKING:
    from peftcli.training.loop import Trainer
    from peftcli.training.reports import StepReport

LOG_NAME = "log.jsonl"


class Callback:
    """Called by the loop on every process it was given on. Override what you need."""

    def on_train_begin(self, trainer: Trainer) -> None:
        """Before the first step (or the first after a resume)."""

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """After each optimizer step."""

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Every `logging_steps` with training figures, and after each evaluation with its metrics."""

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After each evaluation."""

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last step, also when the run fails."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""

    def on_resume(self, trainer: Trainer) -> None:
        """After the trainer and all callbacks were brought to where they stood at a checkpoint."""


class EarlyStopping(Callback):
    """Ends training after `patience` evaluations in a row that were no better by more than `threshold`."""

    def __init__(self, patience: int, threshold: float = 0.0) -> None:
        self.patience, self.threshold = patience, threshold
        self.best: float | None = None
        self.waited = 0

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        value = metrics[trainer.metric]
        if self.best is None or trainer.is_better(value, self.best, self.threshold):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        self.on_resume(trainer)

    def on_resume(self, trainer: Trainer) -> None:
        if self.waited >= self.patience:
            trainer.stop(f"{trainer.metric} has not improved in {self.waited} evaluations")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


class JsonLog(Callback):
    """`log.jsonl`: one JSON object a line. A resumed run first drops what lies after its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG_NAME

    def on_train_begin(self, trainer: Trainer) -> None:
        kept = [row for row in read_log(self.path) if row["step"] <= trainer.progress.step]
        write_atomically(self.path, "".join(map(_line, kept)))

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a `log.jsonl`; a last line that a killed run left unfinished is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


class Trackers(Callback):
    """TensorBoard, Weights & Biases and the like, through Accelerate (`Accelerator(log_with=...)`)."""

    def __init__(self, run_name: str, config: dict[str, Any]) -> None:
        self.run_name, self.config = run_name, config

    def on_train_begin(self, trainer: Trainer) -> None:
        plain = {name: value for name, value in self.config.items() if isinstance(value, (bool, int, float, str))}
        trainer.accelerator.init_trackers(self.run_name, config=plain)

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        values = {name: value for name, value in row.items() if name != "step"}
        trainer.accelerator.log(values, step=row["step"])

    def on_train_end(self, trainer: Trainer) -> None:
        for tracker in trainer.accelerator.trackers:
            tracker.finish()


def require_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers whose package is missing; Accelerate would leave them out with a log line.

    Raises:
        InputError: naming the packages.
    """
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    available = [str(tracker) for tracker in get_available_trackers()]
    missing = [name for name in names if name not in available]
    if missing:
        raise InputError(
            f"not installed: {', '.join(missing)}",
            field="training.report_to",
            allowed=", ".join(available) or "none",
            fix=f"pip install {' '.join(missing)}",
        )
