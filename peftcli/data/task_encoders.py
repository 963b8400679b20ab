"""Examples of the tasks other than language modelling to tokens and what is to be told of them.

An encoder makes samples of an example, says how long they are, and cuts those that are too long; `ENCODERS` says which
task has which. Special tokens are the tokenizer's own: `[CLS] a [SEP] b [SEP]`, `source </s>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftcli.data.collate import IGNORED
from peftcli.data.encoder import Encoder, LossOn, Notes
from peftcli.data.formats import Completion, Preference
from peftcli.data.labels import Labels
from peftcli.data.task_formats import Classified, Pair, Question, Tagged
from peftcli.data.tokens import TaskSample
from peftcli.errors import InputError
from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from peftcli.data.tokens import Sample

MATCHES = (1,)
"""The target of a pair: its two parts belong together, or the first is preferred."""


class TaskEncoder:
    """What the encoders share.

    Args:
        tokenizer: a transformers tokenizer with a fast backend.
        labels: the classes' names, where the recipe gives them.
        loss_on: which answers of a conversation are learnt.
    """

    has_classes = False

    def __init__(self, tokenizer: Any, labels: Sequence[str] | None = None, loss_on: LossOn = "assistant") -> None:
        self.notes = Notes()
        self.labels = Labels(labels) if self.has_classes else None
        self.tokenizer = tokenizer
        self.special = set(tokenizer.all_special_ids)

    def encode(self, example: Any, place: str) -> list[TaskSample]:
        """The samples of one example."""
        raise NotImplementedError

    def length(self, sample: TaskSample) -> int:
        """Tokens of the sample, or of the longer of its two sequences."""
        return max(sample.second, len(sample.ids) - sample.second)

    def pieces(self, sample: TaskSample, longest: int, split: bool) -> list[TaskSample]:
        """What is left of a sample that is too long: its text is cut, the special tokens behind it stay."""
        if not sample.second:
            kept = self._kept(sample.ids, longest)
            return [self._taken(sample, kept)]
        first = self._kept(sample.ids[: sample.second], longest)
        rest = self._kept(sample.ids[sample.second :], longest) + sample.second
        return [self._taken(sample, np.concatenate([first, rest]))._replace(second=len(first))]

    def _kept(self, ids: NDArray[np.int32], longest: int) -> NDArray[np.int64]:
        """Indices of the tokens that stay when `ids` is cut."""
        tail = 0
        while tail < min(len(ids), longest - 1) and int(ids[-1 - tail]) in self.special:
            tail += 1
        if len(ids) <= longest:
            return np.arange(len(ids))
        return np.concatenate([np.arange(longest - tail), np.arange(len(ids) - tail, len(ids))])

    @staticmethod
    def _taken(sample: TaskSample, kept: NDArray[np.int64]) -> TaskSample:
        tags = None if sample.tags is None else sample.tags[kept]
        return sample._replace(ids=sample.ids[kept], supervised=sample.supervised[kept], tags=tags)

    def _ids(self, text: Any, pair: Any = None, **options: Any) -> Any:
        return self.tokenizer(text, pair, add_special_tokens=True, verbose=False, **options)

    def _segment(self, encoded: Any) -> int:
        """Where the second text of a pair begins, for models that have a use for it."""
        if "token_type_ids" not in self.tokenizer.model_input_names:
            return 0
        return encoded.sequence_ids(0).index(1)


class ClassEncoder(TaskEncoder):
    """SEQ_CLS: one text, or two, and its class."""

    has_classes = True

    def encode(self, example: Classified, place: str) -> list[TaskSample]:
        assert self.labels is not None
        target = self.labels.index(example.label, "label")
        encoded = self._ids(example.text, example.pair)
        segment = self._segment(encoded) if example.pair else 0
        return [TaskSample(*_given(encoded["input_ids"]), segment=segment, targets=(target,))]


class TagEncoder(TaskEncoder):
    """TOKEN_CLS: each word's class is learnt at its first token; PyTorch's -100 marks words that have none."""

    has_classes = True

    def encode(self, example: Tagged, place: str) -> list[TaskSample]:
        assert self.labels is not None
        encoded = self._ids(example.words, is_split_into_words=True)
        tags = [
            IGNORED if tag == IGNORED else self.labels.index(tag, f"tags[{i}]") for i, tag in enumerate(example.tags)
        ]
        words = encoded.word_ids(0)
        ids = np.array(encoded["input_ids"], np.int32)
        found = np.full(len(ids), IGNORED, np.int32)
        for index, word in enumerate(words):
            if word is not None and (index == 0 or words[index - 1] != word):
                found[index] = tags[word]
        lost = {index for index, tag in enumerate(tags) if tag != IGNORED} - set(words)
        if lost:
            self.notes.tokenless += len(lost)
            self.notes.first.setdefault("tokenless", place)
        supervised = found != IGNORED
        if not supervised.any():
            raise InputError("has no token that is learnt", place=place)
        return [TaskSample(ids, supervised, tags=np.where(supervised, found, 0).astype(np.int32))]


class SpanEncoder(TaskEncoder):
    """QUESTION_ANS: the first and last token of each answer in `[CLS] question [SEP] context [SEP]`; the first is learnt.

    Without an answer both are token 0, as in SQuAD 2.
    """

    _texts_cut = 0
    """So many so far: each has a number of its own in training and evaluation data together."""

    def encode(self, example: Question, place: str) -> list[TaskSample]:
        encoded = self._ids(example.question, example.context, return_offsets_mapping=True)
        of, offsets = encoded.sequence_ids(0), encoded["offset_mapping"]
        if 1 not in of:
            raise InputError("holds no token", place=place, field="context")
        spans = []
        for start, end in example.answers:
            touched = [i for i, (a, b) in enumerate(offsets) if of[i] == 1 and a < end and b > start]
            if not touched:
                raise InputError("stands for no token", place=place, field="answers")
            spans.append((touched[0], touched[-1]))
        # Always noted, as the text is cut behind it; dropped at the end for models without segments.
        return [TaskSample(*_given(encoded["input_ids"]), segment=of.index(1), targets=_flat(spans))]

    def length(self, sample: TaskSample) -> int:
        return len(sample.ids)

    def pieces(self, sample: TaskSample, longest: int, split: bool) -> list[TaskSample]:
        """Windows over the context, each half over the one before; answers that are not inside are none there.

        With `truncate` only the first, and nothing if it loses the answers.
        """
        tail = len(sample.ids) - 1 - int(np.flatnonzero(~np.isin(sample.ids, list(self.special)))[-1])
        context = len(sample.ids) - tail - sample.segment
        room = longest - sample.segment - tail
        if room < 1:
            return []
        step = max(room // 2, 1)
        self._texts_cut += split
        windows = []
        for start in range(0, max(context - room + step, 1), step) if split else [0]:
            inside = np.arange(start, min(start + room, context)) + sample.segment
            kept = np.concatenate(
                [np.arange(sample.segment), inside, np.arange(len(sample.ids) - tail, len(sample.ids))]
            )
            answers = [span for span in zip(sample.targets[::2], sample.targets[1::2], strict=True) if span[0]]
            found = [(a - start, b - start) for a, b in answers if inside[0] <= a and b <= inside[-1]]
            if answers and not found and not split:
                return []
            window = (self._texts_cut, start, sample.segment, *sample.targets) if split else ()
            windows.append(self._taken(sample, kept)._replace(targets=_flat(found), window=window))
        return windows


class SourceTargetEncoder(TaskEncoder):
    """SEQ_2_SEQ_LM: the encoder's text, then the decoder's, all of which is learnt."""

    def encode(self, example: Completion, place: str) -> list[TaskSample]:
        if not isinstance(example, Completion):
            raise InputError("is a conversation; an encoder-decoder takes strings", place=place)
        if not example.completion.strip():
            return []
        source = self._ids(example.prompt)["input_ids"]
        target = self.tokenizer(text_target=example.completion, add_special_tokens=True, verbose=False)["input_ids"]
        if not source:
            raise InputError("stands for no token", place=place, field="source")
        self.notes.terminators[
            self.tokenizer.convert_ids_to_tokens(target[-1]) if target[-1] in self.special else None
        ] += 1
        ids = np.array([*source, *target], np.int32)
        return [TaskSample(ids, np.arange(len(ids)) >= len(source), second=len(source))]


class PairEncoder(TaskEncoder):
    """FEATURE_EXTRACTION: two texts whose embeddings shall be alike."""

    def encode(self, example: Pair, place: str) -> list[TaskSample]:
        anchor, positive = (self._ids(text)["input_ids"] for text in (example.anchor, example.positive))
        if not anchor or not positive:
            raise InputError("stands for no token", place=place, field="positive" if anchor else "anchor")
        return [TaskSample(*_given([*anchor, *positive]), second=len(anchor), targets=MATCHES)]


class PreferenceEncoder(TaskEncoder):
    """The preferred answer's sequence, then the rejected one's; each as a language model would learn it."""

    def __init__(self, tokenizer: Any, labels: Sequence[str] | None = None, loss_on: LossOn = "assistant") -> None:
        super().__init__(tokenizer)
        self._encoder = Encoder(tokenizer, loss_on)
        self.notes = self._encoder.notes

    def encode(self, example: Preference, place: str) -> list[TaskSample]:
        both: list[Sample] = []
        for name, answer in (("chosen", example.chosen), ("rejected", example.rejected)):
            found = self._encoder.encode(answer, f"{place}: {name}")
            if not found:
                raise InputError("holds nothing but blanks", place=place, field=name)
            both.append(found[-1])  # the whole conversation, where the template writes earlier turns differently
        (chosen, learnt), (rejected, also_learnt) = both
        return [
            TaskSample(
                np.concatenate([chosen, rejected]), np.concatenate([learnt, also_learnt]), len(chosen), targets=MATCHES
            )
        ]

    def pieces(self, sample: TaskSample, longest: int, split: bool) -> list[TaskSample]:
        (piece,) = super().pieces(sample, longest, split)
        both = piece.supervised[: piece.second].any() and piece.supervised[piece.second :].any()
        return [piece] if both else []


def _flat(spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """First and last token of each span, one after another; without a span token 0 twice."""
    return tuple(position for span in dict.fromkeys(spans or [(0, 0)]) for position in span)


def _given(ids: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Tokens of which none is learnt by itself."""
    return np.array(ids, np.int32), np.zeros(len(ids), np.bool_)


ENCODERS: dict[str, type[TaskEncoder]] = {
    "preference": PreferenceEncoder,
    "SEQ_2_SEQ_LM": SourceTargetEncoder,
    "SEQ_CLS": ClassEncoder,
    "TOKEN_CLS": TagEncoder,
    "QUESTION_ANS": SpanEncoder,
    "FEATURE_EXTRACTION": PairEncoder,
}
