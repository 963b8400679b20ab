"""What a run shows while it trains: one bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch  # noqa: TID253
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from peftcli.training.callbacks import Callback

if TYPE_CHECKING:
    from peftcli.training.loop import Trainer
    from peftcli.training.reports import StepReport


def peak_memory() -> int:
    """Most bytes this process has held so far: on the GPU where there is one, else resident in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class ProgressBar(Callback):
    """Loss, learning rate, gradient norm, tokens a second, peak memory and the time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def on_train_begin(self, trainer: Trainer) -> None:
        if not self.console.is_terminal:
            return
        self.bar = Progress(
            BarColumn(bar_width=40 if self._is_wide else 20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task(
            "training", total=trainer.total_steps, completed=trainer.progress.step, figures=""
        )
        self.bar.start()

    @property
    def _is_wide(self) -> bool:
        """Whether there is room for all figures beside the bar."""
        return self.console.width >= 120

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=report.step, figures=_figures(report.row(), short=not self._is_wide))

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        is_evaluation = "eval_loss" in row
        if self.bar is None or is_evaluation:
            figures = _metrics(row) if is_evaluation else _figures(row)
            self.console.print(f"step {row['step']}/{trainer.total_steps}  {figures}", markup=False, highlight=False)

    def on_train_end(self, trainer: Trainer) -> None:
        if self.bar is not None:
            self.bar.stop()


def _figures(row: dict[str, Any], *, short: bool = False) -> str:
    loss, rate = f"loss {row['loss']:.4f}", f"lr {row['lr']:.2e}  grad {row['grad_norm']:.3f}"
    speed, memory = f"{row['tokens_per_second']:,.0f} tok/s", f"{row['memory'] / 1e9:.2f} GB"
    return f"{loss}  {speed}  {memory}" if short else f"{loss}  {rate}  {speed}  {memory}"


def _metrics(row: dict[str, Any]) -> str:
    """`eval loss 0.0141  perplexity 1.014  token accuracy 100.0%`: what counts how often something was right in percent."""
    shown = [
        f"{name.removeprefix('eval_').replace('_', ' ')} "
        + (f"{value:.1%}" if name.endswith(("accuracy", "_f1", "exact_match")) else f"{value:.4f}")
        for name, value in row.items()
        if name.startswith("eval_")
    ]
    return "eval " + "  ".join(shown)
