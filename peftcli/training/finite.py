"""What to say when a loss or a gradient is not a number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch  # noqa: TID253
from accelerate.utils import gather_object  # noqa: TID253
from torch import Tensor  # noqa: TID253

from peftcli.adapters.quantized import is_quantized
from peftcli.errors import RunError

if TYPE_CHECKING:
    from peftcli.training.batches import Window
    from peftcli.training.loop import Trainer

MOST_NAMED = 3  # parameters


def not_finite(trainer: Trainer, window: Window, losses: list[Tensor]) -> RunError:
    """The error that names step, batch, samples and parameters, on whatever process it happened.

    Every process has to call it, before anything has touched a parameter or the disk.

    Args:
        window: this process's batches.
        losses: theirs.
    """
    batches = [
        f"batch {number} of process {trainer.rank} (samples {', '.join(map(str, batch))}) has loss {float(loss)}"
        for number, (batch, loss) in enumerate(zip(window, losses, strict=True), start=1)
        if not math.isfinite(float(loss))
    ]
    weights, gradients = [], []
    packed = {module.weight for module in trainer.model.modules() if is_quantized(module)}  # codes, whatever their type
    for name, parameter in trainer.model.named_parameters():
        if parameter not in packed and not _all_finite(parameter):
            weights.append(f"{name} holds values that are not finite")
        elif parameter.grad is not None and not _all_finite(parameter.grad):
            gradients.append(f"the gradient of {name} is not finite")
    # A weight explains a loss, and both explain a gradient.
    found = gather_object(batches + weights[:MOST_NAMED]) or gather_object(gradients[:MOST_NAMED])
    return RunError(
        f"step {trainer.progress.step + 1}: the loss or its gradient is not finite: {'; '.join(found)}. "
        "Nothing was saved since the last checkpoint; a lower training.learning_rate often helps"
    )


def _all_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
