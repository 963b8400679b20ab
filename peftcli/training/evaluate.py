"""Loss, perplexity and token accuracy over supervised tokens, on all processes together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch  # noqa: TID253
from accelerate import Accelerator  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.data.tokens import TokenDataset
from peftcli.errors import RunError
from peftcli.training.batches import evaluation_batches, to_batch


def evaluate(
    loss: nn.Module, data: TokenDataset, *, batch_size: int, pad_token_id: int, accelerator: Accelerator
) -> dict[str, float]:
    """Score `data`; each process takes its part, and only three sums travel between them.

    Args:
        loss: gives a batch's scores; DDP would have nothing to synchronise here, so it is the bare module there.
        data: what is predicted.
        batch_size: samples per process in one forward pass.
        pad_token_id: fills rows up.
        accelerator: of the processes.

    Returns:
        `eval_loss`, `eval_perplexity` and `eval_token_accuracy`.

    Raises:
        RunError: the loss is not finite.
    """
    scores = torch.zeros(3, dtype=torch.float64)
    was_training = loss.training
    loss.eval()
    with torch.no_grad():
        for indices in evaluation_batches(
            data.lengths, batch_size, world_size=accelerator.num_processes, rank=accelerator.process_index
        ):
            scores += loss(to_batch(data, indices, pad_token_id, accelerator.device), score=True).cpu()
    loss.train(was_training)
    loss_sum, correct, count = gathered(accelerator, scores.tolist()).sum(0).tolist()
    mean = loss_sum / count
    if not math.isfinite(mean):
        raise RunError(f"the evaluation loss is {mean}; nothing was saved")
    return {
        "eval_loss": mean,
        "eval_perplexity": math.exp(min(mean, 700.0)),  # e^710 is infinite, which JSON can't hold
        "eval_token_accuracy": correct / count,
    }


def gathered(accelerator: Accelerator, values: Sequence[float]) -> Tensor:
    """The numbers of every process [processes, values], float64 on the CPU."""
    row = torch.tensor([values], dtype=torch.float64)
    if accelerator.num_processes == 1:
        return row
    return accelerator.gather(row.to(accelerator.device)).cpu()
