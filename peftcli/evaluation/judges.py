"""What models with other heads than a language model's make of their samples: one class a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.data.collate import IGNORED
from peftcli.evaluation.judge import TAG_SEPARATOR, Judge, Judgement, Setting
from peftcli.lazy import numpy as np
from peftcli.training.objectives.base import inputs_of
from peftcli.training.objectives.pairs import PairLoss
from peftcli.training.objectives.spans import best_span, span_logits

if TYPE_CHECKING:
    from peftcli.data.tokens import TokenDataset

FRESH_HEAD = "a base that brings no head for this task has a fresh one, which knows nothing"


class ClassJudge(Judge):
    """SEQ_CLS: the likeliest class."""

    note = FRESH_HEAD
    metrics = ("loss", "accuracy", "macro_f1")

    def rows(self, model: Any, batch: dict[str, Tensor], more: dict[str, Any]) -> Judgement:
        target = batch["targets"][:, 0]
        logits = model(**inputs_of(batch), **more).logits
        predicted = logits.argmax(-1)
        return _numbers(_losses(logits, target), torch.ones_like(target), predicted == target), predicted.tolist()

    def expected(self, index: int) -> str:
        assert self.data.targets is not None
        return self.setting.labels[int(self.data.targets[index, 0])]

    def answer(self, index: int, prediction: Any, batch: list[int]) -> str:
        return self.setting.labels[prediction]


class TagJudge(Judge):
    """TOKEN_CLS: the likeliest class of each word, as a line of tags."""

    note = FRESH_HEAD
    metrics = ("loss", "token_accuracy", "span_f1")

    def rows(self, model: Any, batch: dict[str, Tensor], more: dict[str, Any]) -> Judgement:
        labels = batch["labels"]
        keep = labels != IGNORED
        logits = model(**inputs_of(batch), **more).logits
        predicted = logits.argmax(-1)
        right = ((predicted == labels) & keep).sum(-1)
        tags = [row[kept].tolist() for row, kept in zip(predicted, keep, strict=True)]
        return _numbers(_losses(logits, labels).sum(-1), keep.sum(-1), right), tags

    def expected(self, index: int) -> str:
        assert self.data.tags is not None
        span = slice(self.data.offsets[index], self.data.offsets[index + 1])
        return self._line(self.data.tags[span][self.data[index][1]].tolist())

    def answer(self, index: int, prediction: Any, batch: list[int]) -> str:
        return self._line(prediction)

    def _line(self, tags: Sequence[int]) -> str:
        return TAG_SEPARATOR.join(self.setting.labels[tag].replace(TAG_SEPARATOR, "_") for tag in tags)


class SpanJudge(Judge):
    """QUESTION_ANS: the text of the likeliest span; none where token 0 is likelier to be both its ends.

    Answers are texts as the tokenizer writes their tokens. Of several that are right the best counts, as in SQuAD; the loss
    is the first one's. A context that was cut is one question, of whose windows the likeliest span of all is the answer;
    there is none if token 0 is likelier than it in every window (the rule of transformers' `run_qa.py`). Each window has
    a loss of its own.
    """

    note = FRESH_HEAD
    metrics = ("loss", "qa_em", "qa_f1", "exact_match", "contains", "f1", "rouge_l")

    def __init__(self, data: TokenDataset, setting: Setting) -> None:
        super().__init__(data, setting)
        self._windows = {samples[0]: samples for samples in data.questions}
        if len(self._windows) < len(data):
            self.note += f"; {len(self._windows)} questions are asked in {len(data)} windows: answers are a question's, losses a window's"

    def rows(self, model: Any, batch: dict[str, Tensor], more: dict[str, Any]) -> Judgement:
        outputs, targets = model(**inputs_of(batch), **more), batch["targets"]
        start, end = span_logits(outputs, batch)
        loss = (_losses(start, targets[:, 0]) + _losses(end, targets[:, 1])) / 2
        nothing = start[:, 0] + end[:, 0]
        start[:, 0] = -torch.inf
        first, last = best_span(start, end)
        row = torch.arange(len(first), device=first.device)
        score = start[row, first] + end[row, last]
        some = nothing <= score
        right = ((first * some)[:, None] == targets[:, ::2]) & ((last * some)[:, None] == targets[:, 1::2])
        predicted = zip(first.tolist(), last.tolist(), score.tolist(), nothing.tolist(), strict=True)
        return _numbers(loss, torch.ones_like(first), right.any(1)), list(predicted)

    def settled(self, samples: list[int], predictions: list[Any]) -> tuple[int, Any]:
        index, (first, last, score, _) = max(
            zip(samples, predictions, strict=True), key=lambda predicted: predicted[1][2]
        )
        nothing = min(prediction[3] for prediction in predictions)
        return index, (first, last) if nothing <= score else (0, 0)

    def question(self, index: int) -> str:
        return self._text(self._whole(index)[0])

    def accepted(self, index: int) -> list[str]:
        ids, targets = self._whole(index)
        spans = [span for span in zip(targets[::2], targets[1::2], strict=True) if span[0] != IGNORED]
        return list(dict.fromkeys(self._said(ids, *span) for span in spans))

    def answer(self, index: int, prediction: Any, batch: list[int]) -> str:
        return self._said(self.data[index][0], *prediction)

    def _said(self, ids: Any, first: int, last: int) -> str:
        return self._text(ids[first : last + 1]) if first else ""

    def _whole(self, index: int) -> tuple[Any, list[int]]:
        """Ids and targets of a question before it was cut, put together from its windows."""
        assert self.data.targets is not None
        samples = self._windows[index]
        if len(samples) == 1:
            return self.data[index][0], self.data.targets[index].tolist()
        assert self.data.windows is not None
        ids = self.data[index][0]
        for sample in samples[1:]:  # each holds the end of the one before it, but not the special tokens there
            _, skipped, begin = self.data.windows[sample, :3].tolist()
            ids = np.concatenate([ids[: skipped + begin], self.data[sample][0][begin:]])
        return ids, self.data.windows[index, 3:].tolist()


class TargetJudge(Judge):
    """SEQ_2_SEQ_LM: the likelihood of the target; answers are generated elsewhere."""

    generates = True

    def rows(self, model: Any, batch: dict[str, Tensor], more: dict[str, Any]) -> Judgement:
        labels = batch["second_labels"]
        keep = labels != IGNORED
        logits = model(**inputs_of(batch), **more, labels=labels, use_cache=False).logits[:, -labels.shape[1] :]
        right = ((logits.argmax(-1) == labels) & keep).sum(-1)
        return _numbers(_losses(logits, labels).sum(-1), keep.sum(-1), right), [""] * len(labels)


class PairJudge(Judge):
    """FEATURE_EXTRACTION: the nearest of the batch's second texts to each first one."""

    mixes = False
    metrics = ("loss", "accuracy")

    def rows(self, model: Any, batch: dict[str, Tensor], more: dict[str, Any]) -> Judgement:
        similarities = PairLoss(model, self.setting.temperature, bf16=self.setting.bf16).similarities(batch)
        own = torch.arange(len(similarities), device=similarities.device)
        nearest = similarities.argmax(-1)
        return _numbers(_losses(similarities, own), torch.ones_like(own), nearest == own), nearest.tolist()

    def question(self, index: int) -> str:
        return self._text(self._halves(index)[0])

    def expected(self, index: int) -> str:
        return self._text(self._halves(index)[1])

    def answer(self, index: int, prediction: Any, batch: list[int]) -> str:
        return self.expected(batch[prediction])


class PreferenceJudge(Judge):
    """Preferences: the likelier of two answers. The loss is that of the preferred one's tokens."""

    metrics = ("loss", "accuracy")

    def rows(self, model: Any, batch: dict[str, Tensor], more: dict[str, Any]) -> Judgement:
        (chosen, counts), (rejected, _) = (self._likelihood(model, batch, prefix, more) for prefix in ("", "second_"))
        preferred = chosen > rejected
        return _numbers(-chosen, counts, preferred), preferred.tolist()

    def _likelihood(
        self, model: Any, batch: dict[str, Tensor], prefix: str, more: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Log-likelihood of each row's learnt tokens, and their number."""
        labels = batch[f"{prefix}labels"][:, 1:]
        logits = model(**inputs_of(batch, prefix), **more, use_cache=False).logits
        losses = _losses(logits[:, -labels.shape[1] - 1 : -1], labels)
        return -losses.sum(-1), (labels != IGNORED).sum(-1)

    def question(self, index: int) -> str:
        chosen, _ = self._halves(index)
        learnt = self.data[index][1][: len(chosen)]
        return self._text(chosen[: int(np.argmax(learnt))])

    def expected(self, index: int) -> str:
        return self._answer(index, 0)

    def answer(self, index: int, prediction: Any, batch: list[int]) -> str:
        return self._answer(index, 0 if prediction else 1)

    def _answer(self, index: int, side: int) -> str:
        halves = self._halves(index)
        learnt = self.data[index][1]
        mask = learnt[: len(halves[0])] if side == 0 else learnt[len(halves[0]) :]
        return self._text(halves[side][mask])


JUDGES: dict[str, type[Judge]] = {
    "SEQ_CLS": ClassJudge,
    "TOKEN_CLS": TagJudge,
    "QUESTION_ANS": SpanJudge,
    "SEQ_2_SEQ_LM": TargetJudge,
    "FEATURE_EXTRACTION": PairJudge,
    "preference": PreferenceJudge,
}


def _losses(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy [...] of logits [..., C] at target [...]; 0 where it is ignored."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat = nn.functional.cross_entropy(wide.flatten(0, -2), target.flatten(), reduction="none", ignore_index=IGNORED)
    return flat.view_as(target)


def _numbers(losses: Tensor, counts: Tensor, right: Tensor) -> Tensor:
    return torch.stack([losses.double(), counts.double(), right.double()], 1)
