"""What a judge is: it turns a batch into a loss and a prediction for each row, and says in words what was asked, expected
and predicted. There is one for each task with another head than a language model's (`judges.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253

from peftcli.evaluation.generate import StepProgress
from peftcli.evaluation.metrics import TokenScores
from peftcli.lazy import numpy as np
from peftcli.training.batches import evaluation_batches, to_batch

if TYPE_CHECKING:
    from peftcli.data.tokens import TokenDataset

TAG_SEPARATOR = " "
"""Between the tags of a line."""

Judgement = tuple[Tensor, list[Any]]
"""[loss sum, labels, right labels] of each row [R, 3], and what is predicted for it."""


@dataclass(frozen=True)
class Setting:
    """What judges know beside the data.

    Args:
        tokenizer: the base's.
        labels: names of the classes, where there are some.
        batch_size: rows of a batch; pairs are told from the others of their batch.
        temperature: of pairs, as in training.
        bf16: under bfloat16 autocast.
    """

    tokenizer: Any
    labels: Sequence[str] = ()
    batch_size: int = 32
    temperature: float = 0.05
    bf16: bool = False


class Judge(ABC):
    """One task on one data set."""

    mixes = True
    """Whether rows of several adapters may share a batch."""
    generates = False
    """Whether answers are generated, as a language model's are."""
    note = ""
    """What a reader should know about the base's numbers."""
    metrics: tuple[str, ...] = ()
    """What the task is measured by, where nothing is generated; the first few by default."""

    def __init__(self, data: TokenDataset, setting: Setting) -> None:
        self.data, self.setting = data, setting

    @abstractmethod
    def rows(self, model: Any, batch: dict[str, Tensor], more: dict[str, Any]) -> Judgement:
        """Judge a batch; `more` are further arguments of the model."""

    def question(self, index: int) -> str:
        """What the model is given, for people; of windows `index` is the first one's, here and in `accepted`."""
        return self._text(self.data[index][0])

    def expected(self, index: int) -> str:
        """What is right."""
        return ""

    def accepted(self, index: int) -> list[str]:
        """Every answer that counts as right; the best of them is what a prediction is compared with."""
        return [self.expected(index)]

    def settled(self, samples: list[int], predictions: list[Any]) -> tuple[int, Any]:
        """The sample and the prediction that answer a question, from what is predicted for each of its samples."""
        return samples[0], predictions[0]

    def answer(self, index: int, prediction: Any, batch: list[int]) -> str:
        """A prediction in words; `batch` are the samples it was made among."""
        return str(prediction)

    def _text(self, ids: Any) -> str:
        return self.setting.tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def _halves(self, index: int) -> tuple[Any, Any]:
        """Ids of a sample's two sequences."""
        assert self.data.second is not None
        ids, border = self.data[index][0], int(self.data.second[index])
        return ids[:border], ids[border:]


def judge_rows(
    judge: Judge,
    model: Any,
    pad_token_id: int,
    *,
    adapters: Sequence[str] | None = None,
    progress: StepProgress | None = None,
) -> list[tuple[TokenScores, list[str]]]:
    """Scores and answers of each adapter over the judge's data, or of the model as it stands.

    Args:
        judge: of the task.
        model: in eval mode.
        pad_token_id: fills rows up.
        adapters: names in the model, each of which judges every sample, all in one batch.
        progress: told how many samples are done.

    Returns:
        By adapter: scores by sample, answers by question.
    """
    data, setting = judge.data, judge.setting
    columns = len(adapters or [""])
    found = np.zeros((len(data), columns, 3))
    predicted: list[list[Any]] = [[None] * len(data) for _ in range(columns)]
    neighbours: list[list[int]] = [[]] * len(data)
    done = 0
    for indices in evaluation_batches(data.lengths, max(1, setting.batch_size // columns)):
        batch = to_batch(data, [index for index in indices for _ in range(columns)], pad_token_id, model.device)
        more = {} if adapters is None else {"adapter_names": [*adapters] * len(indices)}
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16) if setting.bf16 else nullcontext():
            numbers, predictions = judge.rows(model, batch, more)
        found[indices] = numbers.double().cpu().numpy().reshape(len(indices), columns, 3)
        for row, prediction in enumerate(predictions):
            index = indices[row // columns]
            predicted[row % columns][index], neighbours[index] = prediction, indices
        done += len(indices)
        if progress is not None:
            progress(done, len(data))
    questions, answers = data.questions, []
    for own in predicted:
        settled = [judge.settled(samples, [own[index] for index in samples]) for samples in questions]
        answers.append([judge.answer(index, prediction, neighbours[index]) for index, prediction in settled])
    return [
        (TokenScores(numbers[:, 0], numbers[:, 1].astype(np.int64), numbers[:, 2].astype(np.int64)), texts)
        for numbers, texts in zip(found.transpose(1, 0, 2), answers, strict=True)
    ]
