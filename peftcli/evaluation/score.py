"""What a causal language model makes of the labels of each sample; rows of one batch may use different adapters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.data.collate import IGNORED
from peftcli.evaluation.generate import StepProgress
from peftcli.evaluation.metrics import TokenScores
from peftcli.lazy import numpy as np
from peftcli.training.batches import to_batch
from peftcli.training.losses import chunk_rows, find_tail, tapped

if TYPE_CHECKING:
    from peftcli.data.tokens import TokenDataset

MAX_TOKENS = 1 << 14  # of one forward pass, padding included


def score_tokens(
    model: Any,
    data: TokenDataset,
    pad_token_id: int,
    *,
    adapters: Sequence[str] | None = None,
    batch_size: int = 32,
    bf16: bool = False,
    progress: StepProgress | None = None,
) -> list[TokenScores]:
    """The loss of every sample.

    Args:
        model: in eval mode; a PeftModel if there are `adapters`.
        data: at least one sample.
        pad_token_id: fills rows up.
        adapters: names in the model, each of which scores every sample, all in one batch; None: the model as it stands.
        batch_size: rows of a batch at most, all adapters together; never less than one sample.
        bf16: under bfloat16 autocast.
        progress: told how many samples are done.

    Returns:
        the scores of each adapter, or of the model alone.
    """
    columns = len(adapters or [""])
    losses = np.zeros((len(data), columns))
    correct = np.zeros((len(data), columns), np.int64)
    rows_of = _Rows(model, bf16)
    order = np.argsort(-data.lengths, kind="stable").tolist()
    done = 0
    while done < len(order):
        longest = int(data.lengths[order[done]])
        size = max(1, min(batch_size, MAX_TOKENS // longest) // columns)
        indices = order[done : done + size]
        batch = to_batch(data, [index for index in indices for _ in range(columns)], pad_token_id, model.device)
        more = {} if adapters is None else {"adapter_names": [*adapters] * len(indices)}
        with torch.no_grad():
            found = rows_of(batch, more).reshape(len(indices), columns, 2).cpu().numpy()
        losses[indices], correct[indices] = found[..., 0], found[..., 1]
        done += len(indices)
        if progress is not None:
            progress(done, len(order))
    return [TokenScores(losses[:, column], data.label_counts, correct[:, column]) for column in range(columns)]


class _Rows:
    """[loss sum, labels ranked first] of each row of a batch, without logits of more than a chunk of tokens at once.

    The head is applied while the model runs, to whole columns of the batch: so it knows which adapter each row uses.
    """

    def __init__(self, model: nn.Module, bf16: bool) -> None:
        self._model, self._bf16 = model, bf16
        self._tail: Any = None
        self._searched = False

    def __call__(self, batch: dict[str, Tensor], more: dict[str, Any]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch["labels"][:, 1:]
        with torch.autocast(labels.device.type, torch.bfloat16) if self._bf16 else nullcontext():
            if not self._searched:
                self._tail, self._searched = find_tail(self._model, inputs), True
            if self._tail is None:
                logits = self._model(**inputs, **more, use_cache=False).logits
                return _row_scores(*_gathered(logits, labels))
            return self._through_tail(inputs, labels, more)

    def _through_tail(self, inputs: dict[str, Tensor], labels: Tensor, more: dict[str, Any]) -> Tensor:
        head, after, found = self._tail.head, self._tail.after, []
        original = head.forward

        def score(hidden: Tensor) -> Tensor:
            states, targets = _gathered(hidden, labels)
            size = max(1, chunk_rows(hidden.device) // len(labels))
            parts = zip(states.split(size, 1), targets.split(size, 1), strict=True)
            found.append(torch.stack([_row_scores(after(original(part)), target) for part, target in parts]).sum(0))
            return hidden[..., :1]

        with tapped(head, score):
            self._model(**inputs, **more, use_cache=False)
        return found[0]


def _gathered(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [R, N, *] that predict labels [R, N], moved together row by row; N is the most labels of a row.

    Prompt learning puts virtual tokens in front of the outputs.
    """
    outputs = outputs[:, -labels.shape[1] - 1 : -1]
    keep = labels != IGNORED
    most = int(keep.sum(1).max())
    places = (~keep).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    index = places.reshape(*places.shape, *[1] * (outputs.dim() - 2)).expand(-1, -1, *outputs.shape[2:])
    return outputs.gather(1, index), labels.gather(1, places)


def _row_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """[loss sum, correct] [R, 2] float64 of logits [R, N, V] at targets [R, N]; ignored ones count nothing."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    real = targets != IGNORED
    wanted = targets.clamp(min=0)
    loss = wide.logsumexp(-1) - wide.gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
    correct = (wide.argmax(-1) == wanted) & real
    return torch.stack([loss.where(real, 0).double().sum(1), correct.double().sum(1)], 1)
