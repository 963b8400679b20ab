"""How many optimizer steps a run has, and how many of them warm up. Needs no torch."""

from __future__ import annotations

import math

from peftcli.recipe.training_section import TrainingSection


def total_steps(settings: TrainingSection, steps_per_epoch: int | None) -> int:
    """Optimizer steps of the run; those of an epoch may be unknown (None) where `max_steps` is set."""
    if steps_per_epoch is None or settings.max_steps > 0:
        return settings.max_steps
    return math.ceil(settings.num_train_epochs * steps_per_epoch)


def warmup_steps(settings: TrainingSection, steps: int) -> int:
    """Those of a run's steps in which the learning rate rises."""
    return settings.warmup_steps or math.ceil(settings.warmup_ratio * steps)
