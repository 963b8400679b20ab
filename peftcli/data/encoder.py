"""Examples to tokens with their loss mask, and notes of everything a user should know about them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from peftcli.data.formats import Completion, Conversation, Example
from peftcli.data.templates import ChatTemplate
from peftcli.errors import InputError
from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from peftcli.data.tokens import Sample

LossOn: TypeAlias = Literal["all", "completion", "assistant", "last_assistant"]


@dataclass
class Notes:
    """What was seen while encoding; counts are of samples unless said otherwise.

    Args:
        beginnings: by how many BOS tokens samples begin with.
        terminators: by the control token that ends a learnt answer; `None` where none does.
        control_tokens: by control tokens that the data holds as text.
        unprompted: answers that do not begin with the template's generation prompt.
        rewritten: samples more than conversations, as the template writes earlier turns differently later.
        merged: answers whose first token holds the end of the prompt, too.
        openings: assistant turns that open a conversation, which nothing asks for: not learnt.
        blanks: answers without a visible character beside others that have some: not learnt.
        tokenless: words with a class that stand for no token (a blank, a zero-width character): not learnt.
        first: for each kind of note, the place where it was first seen.
    """

    beginnings: Counter[int] = field(default_factory=Counter)
    terminators: Counter[str | None] = field(default_factory=Counter)
    control_tokens: Counter[str] = field(default_factory=Counter)
    unprompted: int = 0
    rewritten: int = 0
    merged: int = 0
    openings: int = 0
    blanks: int = 0
    tokenless: int = 0
    first: dict[str, str] = field(default_factory=dict)


class Encoder:
    """Tokenises examples for one tokenizer and one `loss_on`.

    | loss_on | conversation | prompt and completion | text |
    |---|---|---|---|
    | all | every token | every token | every token |
    | assistant | every answer | completion | every token |
    | completion | the answers behind the last question | completion | every token |
    | last_assistant | the last answer | completion | every token |

    An answer includes its end-of-turn token. A token that spans the border between prompt and answer counts as answer.

    Raises:
        InputError: the tokenizer can't tell which characters a token stands for.
    """

    def __init__(self, tokenizer: Any, loss_on: LossOn) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"the tokenizer ({type(tokenizer).__name__}) does not say which characters a token stands for, "
                "so the loss can't be put on answers only",
                fix="use a base with a tokenizer.json (a fast tokenizer), or convert its tokenizer to one",
            )
        self.notes = Notes()
        self._tokenizer, self._loss_on, self._template = tokenizer, loss_on, ChatTemplate(tokenizer)
        self._control = {
            index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        longest_first = sorted(self._control.values(), key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    labels: None = None
    """A language model has no classes (`task_encoders.py` has the other tasks)."""

    def length(self, sample: Sample) -> int:
        """Tokens of the sample."""
        return len(sample[0])

    def pieces(self, sample: Sample, longest: int, split: bool) -> list[Sample]:
        """A sample that is too long, cut, or cut into several."""
        ids, supervised = sample
        starts = range(0, len(ids), longest) if split else [0]
        pieces = [(ids[start : start + longest], supervised[start : start + longest].copy()) for start in starts]
        for _, mask in pieces:
            mask[0] = False  # nothing predicts the first token of a sample
        return pieces

    def encode(self, example: Example, place: str) -> list[Sample]:
        """The samples of one example; none if all its answers are blank.

        Most examples are one sample. A conversation becomes several if the template writes an earlier turn differently
        once later ones follow (without its reasoning, say): each answer is then learnt from what the model is given
        when it has to write it.

        Raises:
            InputError: nothing of the example is learnt, or the template refuses it.
        """
        if isinstance(example, Completion):
            samples = self._completion(example, place)
        elif not self._tokenizer.chat_template:
            raise InputError(
                "is a conversation, but the tokenizer has no chat template",
                place=place,
                fix="use an instruction-tuned base, or data with a string prompt and completion",
            )
        elif self._loss_on == "all":
            samples = self._whole(example, place)
        else:
            samples = self._answers(example, place)
        for ids, supervised in samples:
            supervised[:1] = False
            bos = self._tokenizer.bos_token_id
            self.notes.beginnings[0 if bos is None else int(np.argmin([*(ids[:3] == bos), False]))] += 1
            if not supervised.any():
                raise InputError("has no token that is learnt", place=place)
        return samples

    def _completion(self, example: Completion, place: str) -> list[Sample]:
        """Plain text: BOS as the tokenizer does it, EOS at the end."""
        if not example.completion.strip():
            return []
        self._note_control_tokens(example.prompt + example.completion, place)
        ids, offsets = self._tokens(example.prompt + example.completion, add_special_tokens=True)
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if bos is not None and (ids[:2] == bos).sum() == 2:  # the text brought its own
            ids, offsets = ids[1:], offsets[1:]
        start = 0 if self._loss_on == "all" else len(example.prompt)
        first = self._first_behind(offsets, start, place)
        if eos is not None and ids[-1:] != eos:
            ids = np.append(ids, np.int32(eos))
        self.notes.terminators[self._control.get(int(ids[-1]))] += 1
        return [(ids, np.arange(len(ids)) >= first)]

    def _whole(self, example: Conversation, place: str) -> list[Sample]:
        self._note_messages(example, place)
        ids, _ = self._tokens(self._template.render(example.messages, example.tools, place))
        return [(ids, np.ones(len(ids), np.bool_))]

    def _answers(self, example: Conversation, place: str) -> list[Sample]:
        """One sample, or as many as the template makes of the conversation; built from the last answer backwards."""
        samples: list[Sample] = []
        for index in reversed(self._learnt_turns(example, place)):
            answer = self._template.answer(example.messages, example.tools, index, place)
            if not answer.prompted:
                self._note("unprompted", place)
            ids, offsets = self._tokens(answer.text)
            first = self._first_behind(offsets, answer.start, place)
            own = self._control_at_end(example.messages[index])
            end = self._end_of_turn(answer.text, ids, offsets, first, own)
            self.notes.terminators[self._control.get(int(ids[end - 1]))] += 1
            if samples and np.array_equal(samples[-1][0][:end], ids[:end]):
                samples[-1][1][first:end] = True
            else:
                samples.append((ids, (np.arange(len(ids)) >= first) & (np.arange(len(ids)) < end)))
        if len(samples) > 1:
            self._note("rewritten", place, len(samples) - 1)
        if samples:
            self._note_messages(example, place)
        return samples[::-1]

    def _learnt_turns(self, example: Conversation, place: str) -> list[int]:
        """Indices of the assistant turns that the loss is on; none if all are blank."""
        roles = [message["role"] for message in example.messages]
        answers = [index for index, role in enumerate(roles) if role == "assistant"]
        if not answers:
            raise InputError("has no assistant turn, so no token is learnt", place=place, field="messages")
        if self._loss_on == "last_assistant":
            answers = answers[-1:]
        elif self._loss_on == "completion":
            asked = max((index for index in range(answers[-1]) if roles[index] == "user"), default=0)
            answers = [index for index in answers if index > asked]
        answers = [index for index in answers if example.trainable[index]]
        if answers[:1] == [0]:
            self._note("openings", place)
            answers = answers[1:]
        if not answers:
            raise InputError(
                f"has no assistant turn that is learnt with loss_on: {self._loss_on}",
                place=place,
                field="messages",
                fix="a turn is left out by `train: false`, and one that opens the conversation answers nothing",
            )
        learnt = [index for index in answers if not _is_blank(example.messages[index])]
        if 0 < len(learnt) < len(answers):
            self._note("blanks", place, len(answers) - len(learnt))
        return learnt

    def _tokens(self, text: str, add_special_tokens: bool = False) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Ids [T] and the characters [T, 2] each stands for. A template's text holds its own BOS: none is added."""
        encoded = self._tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False
        )
        offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        return np.array(encoded["input_ids"], np.int32), offsets

    def _first_behind(self, offsets: NDArray[np.int64], start: int, place: str) -> int:
        """Index of the first token with a character at or behind `start`."""
        behind = np.flatnonzero(offsets[:, 1] > start)
        if not len(behind):
            return len(offsets)
        if offsets[behind[0], 0] < start:
            self._note("merged", place)
        return int(behind[0])

    def _end_of_turn(self, text: str, ids: NDArray[np.int32], offsets: NDArray[np.int64], first: int, own: int) -> int:
        """Index behind the first of the control tokens that end the text, blanks between and behind them left out.

        The model stops there: what a template writes after it (a line break, Phi's end of text) is not its work. All
        that is left if no control token ends the text.

        Args:
            own: so many of them are the answer's words (`cat <filename>`), unless they are what ends a turn.
        """
        ending: list[int] = []
        for index in reversed(range(first, len(ids))):
            if int(ids[index]) in self._control:
                ending.append(index)
            elif text[slice(*offsets[index])].strip():
                break
        if len(ending) <= own:
            return len(ids)
        ending.reverse()
        return next(index for index in ending if ids[index] == ids[ending[own]]) + 1

    def _control_at_end(self, message: dict[str, Any]) -> int:
        """How many control tokens an answer's content ends with, up to the end token: who writes that means it."""
        if message.get("tool_calls"):  # they stand behind the content
            return 0
        content, eos = message["content"], self._tokenizer.eos_token
        tokens: list[str] = []
        end = len(content)
        for found in reversed(list(self._control_pattern.finditer(content))):
            if content[found.end() : end].strip():
                break
            tokens.insert(0, found[0])
            end = found.start()
        return tokens.index(eos) if eos in tokens else len(tokens)

    def _note(self, kind: str, place: str, count: int = 1) -> None:
        setattr(self.notes, kind, getattr(self.notes, kind) + count)
        self.notes.first.setdefault(kind, place)

    def _note_messages(self, example: Conversation, place: str) -> None:
        for message in example.messages:
            self._note_control_tokens(message["content"], place)

    def _note_control_tokens(self, text: str, place: str) -> None:
        found = self._control_pattern.findall(text)
        if found:
            self.notes.control_tokens.update(found)
            self.notes.first.setdefault("control_tokens", place)


def _is_blank(message: dict[str, Any]) -> bool:
    """Whether an answer has neither a visible character nor anything else, such as a tool call."""
    return not message["content"].strip() and not message.get("tool_calls")
