"""What the loop tells: of one step, and of the whole run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. `loss` is the mean over labels since the last log entry; `memory` is in bytes."""

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    memory: int

    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        steps: optimizer steps done.
        best_step: step of the best evaluation, None without evaluation.
        best_metrics: the evaluation there.
        metrics: the last evaluation.
        tokens: tokens seen over the whole run, without padding.
        stopped: why it ended before its last step, or None.
        seconds: time in the loop.
    """

    steps: int
    best_step: int | None
    best_metrics: dict[str, float] | None
    metrics: dict[str, float] | None
    tokens: int
    stopped: str | None
    seconds: float
