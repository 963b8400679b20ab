"""What a data set's evaluation gives, on all processes together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch  # noqa: TID253
from accelerate import Accelerator  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.data.tokens import TokenDataset
from peftcli.errors import RunError
from peftcli.training.batches import evaluation_batches, to_batch


def evaluate(
    loss: nn.Module,
    metrics: Callable[[Sequence[float]], dict[str, float]],
    data: TokenDataset,
    *,
    batch_size: int,
    pad_token_id: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Score `data`; each process takes its part, and only sums travel between them.

    Args:
        loss: gives a batch's scores; DDP would have nothing to synchronise here, so it is the bare module there.
        metrics: what the sums of these scores tell.
        data: what is predicted.
        batch_size: samples per process in one forward pass.
        pad_token_id: fills rows up.
        accelerator: of the processes.

    Returns:
        `eval_loss` and the task's other metrics.

    Raises:
        RunError: the loss is not finite.
    """
    scores: list[Tensor] = []
    was_training = loss.training
    loss.eval()
    with torch.no_grad():
        for indices in evaluation_batches(
            data.lengths, batch_size, world_size=accelerator.num_processes, rank=accelerator.process_index
        ):
            batch = to_batch(data, indices, pad_token_id, accelerator.device)
            scores.append(loss(batch, score=True).double().cpu())
    loss.train(was_training)
    sums = gathered(accelerator, torch.stack(scores).sum(0).tolist()).sum(0).tolist()
    found = metrics(sums)
    if not math.isfinite(found["eval_loss"]):
        raise RunError(f"the evaluation loss is {found['eval_loss']}; nothing was saved")
    return found


def gathered(accelerator: Accelerator, values: Sequence[float]) -> Tensor:
    """The numbers of every process [processes, values], float64 on the CPU."""
    row = torch.tensor([values], dtype=torch.float64)
    if accelerator.num_processes == 1:
        return row
    return accelerator.gather(row.to(accelerator.device)).cpu()
