"""What is learnt of a conversation, against an independent reference: transformers' own mask of marked templates.

Each family's template gets marks (`{% generation %}`) around the answers that ought to be learnt, and transformers says which
tokens stand between them. Our masks come from the unmarked templates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data import families
from data.families import family
from peftcli.data.encoder import Encoder
from peftcli.data.formats import parse_row

ANSWERS = {
    "chatml": "{{ m.content }}<|im_end|>",
    "chatml_tools": "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>",
    "llama3": "{{ m.content | trim }}<|eot_id|>",
    "gemma": "{{ m.content | trim }}<end_of_turn>",
    "mistral": " {{ m.content | trim }}{{ eos_token }}",
    "phi": "{{ m.content }}<|end|>",
    "thinking": "{{ m.content }}<|im_end|>",
    "harmony": "<|message|>{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}",
    "qwen3": families.QWEN3[families.QWEN3.index("{% if m.role == 'assistant' %}") :].partition("<|im_end|>")[0]
    + "<|im_end|>",
}
"""What each family's template writes for an answer, its end of turn included."""

ALTERNATING = {"gemma", "mistral"}
"""Templates that know users and assistants only, one after the other."""

PIECES = st.sampled_from(
    [
        "hello",
        " world",
        "a",
        "4",
        "?",
        " ",
        "\n",
        "\n\n",
        "é",
        "日本",
        "🙂",
        "assistant",
        "user\n",
        "[INST]",
        "<|im_end|>",
        "</think>",
    ]
)


@st.composite
def rows(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """A row of the format chat as people have it: turns in any order the template knows, some not to be trained."""
    tools = name == "chatml_tools"
    opening = [] if name in ALTERNATING else draw(st.lists(st.just("system"), max_size=1))
    if name in ALTERNATING:
        roles = ["user", "assistant"] * draw(st.integers(1, 3))
    else:
        roles = [*draw(st.lists(st.sampled_from(["user", "assistant", "tool"]), max_size=5)), "user", "assistant"]
        roles += draw(st.lists(st.sampled_from(["user", "assistant"]), max_size=2))
    if name == "harmony":  # it ends the last turn of all differently: a second answer in a row is refused
        roles = [role for before, role in zip(["", *roles], roles, strict=False) if {before, role} != {"assistant"}]
    messages = []
    for role in opening + roles:
        message: dict[str, Any] = {"role": role, "content": "".join(draw(st.lists(PIECES, max_size=4)))}
        if role == "assistant":
            # A control token at its end is the answer's own, which has rules and tests of its own (test_encoder.py).
            message["content"] += (
                draw(st.sampled_from(["", "fine", " thanks\n"])) if message["content"].isspace() else "."
            )
            message |= draw(st.sampled_from([{}, {}, {"train": True}, {"train": False}, {"weight": 0}]))
            if tools and draw(st.booleans()):
                message["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {"a": [1, "é"]}}}]
        messages.append(message)
    return {"messages": messages, **({"tools": [{"name": "f"}]} if tools and draw(st.booleans()) else {})}


def wanted(messages: list[dict[str, Any]], loss_on: str) -> list[int]:
    """The turns that are learnt, as README says it."""
    roles = "".join(message["role"][0] for message in messages)
    last = roles.rindex("a")
    first = {"assistant": 0, "last_assistant": last, "completion": roles.rfind("u", 0, last) + 1}[loss_on]
    return [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
        and 0 < index >= first
        and message.get("train", True)
        and message.get("weight", 1)
        and (message["content"].strip() or "tool_calls" in message)
    ]


def reference(name: str, row: dict[str, Any], index: int) -> tuple[list[int], np.ndarray]:
    """Tokens of the conversation up to the answer at `index`, and which of them transformers says lie between its marks."""
    tokenizer, answer = family(name), ANSWERS[name]
    assert tokenizer.chat_template.count(answer) == 1
    marks = "{% generation %}" + answer + "{% endgeneration %}"
    marked = tokenizer.chat_template.replace(
        answer, "{% if m.learn %}" + marks + "{% else %}" + answer + "{% endif %}{{ '' }}"
    )
    turns = [
        {**{key: turn[key] for key in ("role", "content", "tool_calls") if key in turn}, "learn": number == index}
        for number, turn in enumerate(row["messages"][: index + 1])
    ]
    plain, tools = tokenizer.chat_template, row.get("tools")
    texts = [tokenizer.apply_chat_template(turns, tools, chat_template=one, tokenize=False) for one in (plain, marked)]
    assert texts[0] == texts[1]
    found = tokenizer.apply_chat_template(
        turns, tools, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], np.array(found["assistant_masks"], bool)


@pytest.mark.parametrize("loss_on", ["assistant", "completion", "last_assistant"])
@pytest.mark.parametrize("name", ANSWERS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_exactly_the_answers_between_the_marks_are_learnt(name: str, loss_on: str, data: st.DataObject) -> None:
    row = data.draw(rows(name))
    answers = wanted(row["messages"], loss_on)
    assume(answers)
    samples = Encoder(family(name), loss_on).encode(parse_row("chat", row, "here", True), "here")
    left = [mask.copy() for _, mask in samples]
    for index in answers:
        ids, mask = reference(name, row, index)
        end = int(np.flatnonzero(mask)[-1]) + 1
        [sample] = [
            number
            for number, (ours, learnt) in enumerate(samples)
            if ours[:end].tolist() == ids[:end] and learnt[:end][mask[:end]].all()
        ][:1]
        left[sample][:end][mask[:end]] = False
    assert not any(mask.any() for mask in left), "learnt without being asked for"


@pytest.mark.parametrize("name", ANSWERS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_all_is_every_token_but_the_first_and_a_cut_changes_no_mask(name: str, data: st.DataObject) -> None:
    row = data.draw(rows(name))
    tokenizer = family(name)
    encoder = Encoder(tokenizer, "all")
    [(ids, mask)] = encoder.encode(parse_row("chat", row, "here", True), "here")
    turns = [{key: turn[key] for key in ("role", "content", "tool_calls") if key in turn} for turn in row["messages"]]
    assert ids.tolist() == tokenizer.apply_chat_template(turns, row.get("tools"), return_dict=False)
    assert mask.tolist() == [False] + [True] * (len(ids) - 1)
    drawn = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    drawn[0] = False
    longest = data.draw(st.integers(2, len(ids)))
    [(cut, kept)] = encoder.pieces((ids, drawn), longest, split=False)
    assert cut.tolist() == ids[:longest].tolist() and kept.tolist() == drawn[:longest].tolist()
    pieces = encoder.pieces((ids, drawn), longest, split=True)
    assert np.concatenate([piece for piece, _ in pieces]).tolist() == ids.tolist()
    joined = np.concatenate([kept for _, kept in pieces])
    starts = np.arange(len(ids)) % longest == 0  # nothing predicts the first token of a piece
    assert joined.tolist() == (drawn & ~starts).tolist()
