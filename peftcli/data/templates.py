"""A tokenizer's own chat template, and where in what it writes an assistant's answer begins.

No string is ever searched for. What the model is given at inference is what the template writes for the turns before,
with the generation prompt; an answer is what the template writes behind that once the turn is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftcli.data.values import text
from peftcli.errors import InputError, printable


@dataclass(frozen=True)
class Answer:
    """A conversation up to one assistant turn.

    Args:
        text: what the template writes for it.
        start: character at which the assistant's part begins.
        prompted: whether `text[:start]` is exactly what the model is given at inference.
    """

    text: str
    start: int
    prompted: bool


class ChatTemplate:
    """The chat template of a transformers tokenizer, rendered in transformers' sandbox."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, place: str, prompt: bool = False
    ) -> str:
        """The text of `messages`, with the generation prompt if `prompt`.

        Raises:
            InputError: the template refuses the messages, or fails.
        """
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=prompt, tokenize=False
            )
        except Exception as error:  # a template is foreign code: it may raise anything
            roles = " ".join(str(message["role"]) for message in messages)
            raise InputError(
                f"the tokenizer's chat template fails: {printable(error) or type(error).__name__}",
                place=place,
                fix=f"the row's roles are {printable(roles)}",
            ) from error
        try:
            return text(rendered, "messages")
        except InputError as error:  # of what nothing else looks into: a tool's schema, a call's arguments
            raise error.at(place=place) from error

    def answer(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, index: int, place: str
    ) -> Answer:
        """The conversation up to the assistant turn `messages[index]`; `index` is at least 1.

        Raises:
            InputError: the template writes the turns before differently once the answer is there, so that what the
                model would learn from is not what it is given later.
        """
        whole = self.render(messages[: index + 1], tools, place)
        prompt = self.render(messages[:index], tools, place, prompt=True)
        if whole.startswith(prompt):
            return Answer(whole, len(prompt), prompted=True)
        # The generation prompt may hold more than the beginning of every answer (`<think>`); the turns before may not.
        # Where it begins like this very answer (`<div>`), others tell where answers begin.
        others = (self.render([*messages[:index], {**messages[index], "content": one}], tools, place) for one in "ab")
        start = min(_shared(one, prompt) for one in (whole, *others))
        before = self.render(messages[:index], tools, place)
        if start < _shared(before, prompt):
            raise InputError(
                f"the tokenizer's chat template writes the turns before turn {index + 1} differently once it is there",
                place=place,
                fix="some templates put the system turn into the last user turn: write it there yourself",
            )
        return Answer(whole, start, prompted=False)


def _shared(first: str, second: str) -> int:
    """How many characters two texts have in common from their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))
