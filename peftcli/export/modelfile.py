"""Ollama's Modelfile: base, adapter, the chat template the adapter was trained with, and where answers end.

Ollama's templates are Go's, ours are Jinja. What a template puts around each message is found by rendering messages that
can be recognised, and written down in Go; a template that does more than that is left out, with a word about it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftcli.adapters.base_facts import BaseFacts

SYSTEM, USER, ANSWER, AGAIN = (f"zq{index}qz" for index in range(4))
"""Contents that no template contains."""


@dataclass(frozen=True)
class Turns:
    """What stands around messages.

    Attributes:
        default: what a conversation without a system message begins with: the template's own.
        before_system, after_system: around a system message.
        before_user: before a user's message.
        before_answer: between a user's message and the answer; also what asks for one.
        after_answer: after an answer, before the next message.
    """

    default: str
    before_system: str
    after_system: str
    before_user: str
    before_answer: str
    after_answer: str

    def go(self) -> str:
        """As a Go template."""
        default = (
            f'{{{{- if ne (index .Messages 0).Role "system" }}}}{self.default}{{{{ end }}}}' if self.default else ""
        )
        return default + (
            '{{- range .Messages }}{{ if eq .Role "system" }}'
            f"{self.before_system}{{{{ .Content }}}}{self.after_system}"
            '{{ else if eq .Role "user" }}'
            f"{self.before_user}{{{{ .Content }}}}{self.before_answer}"
            '{{ else if eq .Role "assistant" }}'
            f"{{{{ .Content }}}}{self.after_answer}"
            "{{ end }}{{ end }}"
        )

    def render(self, messages: list[dict[str, str]]) -> str:
        """What the Go template makes of messages."""
        around = {
            "system": (self.before_system, self.after_system),
            "user": (self.before_user, self.before_answer),
            "assistant": ("", self.after_answer),
        }
        default = "" if messages[0]["role"] == "system" else self.default
        return default + "".join(
            around[message["role"]][0] + message["content"] + around[message["role"]][1] for message in messages
        )


def modelfile(adapter: Path, base: BaseFacts, file: str) -> str:
    """The text of a Modelfile.

    Args:
        adapter: its folder; a tokenizer in it is preferred to the base's.
        base: the base model.
        file: name of the adapter file beside the Modelfile.
    """
    lines = [f"FROM {base.folder.resolve()}", f"ADAPTER ./{file}"]
    tokenizer = _tokenizer(adapter, base)
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return "\n".join([*lines, "# The base has no chat template.", ""])
    turns = find_turns(tokenizer)
    if turns is None or any(mark in turns.go() for mark in ('"""', "zq")):
        lines.append("# The chat template does more than Go's can say: Ollama's own for this base is used.")
    else:
        lines.append(f'TEMPLATE """{turns.go()}"""')
    ends = {tokenizer.eos_token, turns.after_answer.strip() if turns else None}
    lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in sorted(end for end in ends if end)]
    return "\n".join([*lines, ""])


def find_turns(tokenizer: Any) -> Turns | None:
    """What a tokenizer's template puts around messages; None if that isn't all.

    A BOS token that the tokenizer itself begins texts with is left out: llama.cpp adds it, too.
    """
    talk = [_message("user", USER), _message("assistant", ANSWER), _message("user", AGAIN)]
    plain, system = _rendered(tokenizer, talk), _rendered(tokenizer, [_message("system", SYSTEM), *talk])
    if plain is None:
        return None
    head, middle, back, tail = _split(plain, USER, ANSWER, AGAIN)
    before_user, around_system = head, ("", "\n")
    if system is not None and SYSTEM in system:
        before, rest = system.split(SYSTEM, 1)
        until_user = rest.split(USER, 1)[0]
        alone = _rendered(tokenizer, [_message("system", SYSTEM)], ask=False) or ""
        after = alone.partition(SYSTEM)[2]
        if not after or not until_user.startswith(after):
            after = until_user.removesuffix(head)
        before_user, around_system = until_user.removeprefix(after), (before, after)
    if tail != middle or not head.endswith(before_user) or not back.endswith(before_user):
        return None
    default = head.removesuffix(before_user)
    turns = Turns(default, *around_system, before_user, middle, back.removesuffix(before_user))
    talks = [talk, talk[:1]] + ([[_message("system", SYSTEM), *talk[:count]] for count in (1, 3)] if system else [])
    is_plain = not any(mark in part for mark in ("{{", "}}") for part in (head, middle, back, *around_system))
    return turns if is_plain and all(turns.render(some) == _rendered(tokenizer, some) for some in talks) else None


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _rendered(tokenizer: Any, messages: list[dict[str, str]], *, ask: bool = True) -> str | None:
    """The text, by default as a prompt for an answer; None where the template refuses it (some know no system message)."""
    import jinja2

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except jinja2.TemplateError:
        return None
    adds_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds_bos else text


def _split(text: str, *marks: str) -> list[str]:
    """The text before, between and after marks."""
    parts = []
    for mark in marks:
        before, _, text = text.partition(mark)
        parts.append(before)
    return [*parts, text]


def _tokenizer(adapter: Path, base: BaseFacts) -> Any:
    from peftcli.training.tokenizer import read_tokenizer

    folder = adapter if (adapter / "tokenizer_config.json").is_file() else base.folder
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return read_tokenizer(replace(base, folder=folder))
