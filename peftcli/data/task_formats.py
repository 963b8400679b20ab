"""Rows of the tasks other than language modelling.

| format | columns | task |
|---|---|---|
| classification | text, label (text_pair) | SEQ_CLS |
| tokens | tokens, tags: two lists of equal length | TOKEN_CLS |
| qa | question, context, answers: SQuAD's | QUESTION_ANS |
| pairs | anchor, positive | FEATURE_EXTRACTION |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from peftcli.data.values import text
from peftcli.errors import InputError, printable

Label: TypeAlias = str | int
"""A class as the data name it."""


@dataclass(frozen=True)
class Classified:
    """A text, or two, and its class."""

    text: str
    pair: str | None
    label: Label


@dataclass(frozen=True)
class Tagged:
    """Words and the class of each."""

    words: list[str]
    tags: list[Label]


@dataclass(frozen=True)
class Question:
    """A question, a text, and the characters [start, end) of it that are answers: each is right, the first one is learnt."""

    question: str
    context: str
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Pair:
    """Two texts that mean the same."""

    anchor: str
    positive: str


def classification(values: dict[str, Any], templated: bool) -> Classified:
    pair = values.get("text_pair")
    first = _visible(values["text"], "text")
    return Classified(first, None if pair is None else text(pair, "text_pair"), label(values["label"], "label"))


def tokens(values: dict[str, Any], templated: bool) -> Tagged:
    words, tags = (_list(values[name], name) for name in ("tokens", "tags"))
    if len(words) != len(tags):
        raise InputError(f"has {len(tags)} entries for {len(words)} tokens", field="tags")
    return Tagged(
        [text(word, f"tokens[{index}]") for index, word in enumerate(words)],
        [label(tag, f"tags[{index}]") for index, tag in enumerate(tags)],
    )


def question(values: dict[str, Any], templated: bool) -> Question:
    """SQuAD's form: `answers` is {text: [...], answer_start: [...]}, or a list of {text, answer_start}.

    Where each answer stands is checked against the context; a question without any has no answer in it.
    """
    asked, context, answers = (
        _visible(values["question"], "question"),
        text(values["context"], "context"),
        values["answers"],
    )
    if isinstance(answers, list) and all(isinstance(item, dict) for item in answers):
        answers = {name: [item.get(name) for item in answers] for name in ("text", "answer_start")}
    if not isinstance(answers, dict) or not {"text", "answer_start"} <= set(answers):
        raise InputError(f"must have `text` and `answer_start`, but is {printable(repr(answers), 80)}", field="answers")
    texts, starts = (_as_list(answers[name]) for name in ("text", "answer_start"))
    if len(texts) != len(starts):
        raise InputError(f"has {len(texts)} texts and {len(starts)} starts", field="answers")
    spans = (_span(context, text(said, "answers.text"), start) for said, start in zip(texts, starts, strict=True))
    return Question(asked, context, tuple(dict.fromkeys(spans)))


def _span(context: str, said: str, start: Any) -> tuple[int, int]:
    """Characters [start, end) of an answer, which must stand there."""
    if type(start) is not int:
        raise InputError(f"must be a whole number, but is {printable(repr(start), 40)}", field="answers.answer_start")
    if not said:
        raise InputError("is empty", field="answers.text", fix="a question without an answer has empty lists")
    if start < 0 or context[start : start + len(said)] != said:
        found = printable(context[max(start, 0) : max(start, 0) + len(said)], 80)
        raise InputError(
            f"the context holds {found!r} at character {start}, not the answer {printable(said, 80)!r}",
            field="answers.answer_start",
        )
    return start, start + len(said)


def pair(values: dict[str, Any], templated: bool) -> Pair:
    return Pair(_visible(values["anchor"], "anchor"), _visible(values["positive"], "positive"))


def label(value: Any, column: str) -> Label:
    """A class: a word or a whole number."""
    if isinstance(value, bool):
        return str(value).lower()
    if type(value) is int:
        return value
    if isinstance(value, float):
        raise InputError(f"must be a word or a whole number, but is {value}", field=column)
    name = text(value, column)
    if not name.strip():
        raise InputError("is an empty label", field=column)
    return name


def _visible(value: Any, column: str) -> str:
    found = text(value, column)
    if not found.strip():
        raise InputError("holds nothing but blanks", field=column)
    return found


def _list(value: Any, column: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(f"must be a list with entries, but is {printable(repr(value), 80)}", field=column)
    return value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
