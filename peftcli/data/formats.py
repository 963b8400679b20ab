"""Rows to examples: what a row's columns mean, checked strictly, in one shape for all formats.

| format | columns | with the tokenizer's chat template | as plain text |
|---|---|---|---|
| chat | messages (tools) | conversation | - |
| sharegpt | conversations (system, tools) | conversation | - |
| alpaca | instruction, output (input) | user and assistant turn | Stanford Alpaca's prompt, output |
| prompt_completion | prompt, completion (tools) | user and assistant turn | prompt, completion |
| text | text | - | text |
| preference | prompt, chosen, rejected (tools) | two conversations | two prompts and completions |
| seq2seq | source, target | - | source, target |

The other tasks' formats (classification, tokens, qa, pairs) are in `task_formats.py`; `TASK_FORMATS` says which task takes
which.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, TypeAlias

from peftcli.data import task_formats
from peftcli.data.values import objects, text
from peftcli.errors import InputError, nearest, printable
from peftcli.files import parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
OPENING_ROLES = ("system", "developer")
_LATER_ROLES = "user assistant tool"
SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"},
    **{"observation": "tool", "function_response": "tool"},
}


@dataclass(frozen=True)
class Conversation:
    """Turns as chat templates expect them.

    Args:
        messages: each with `role` and `content`, perhaps `tool_calls`, `reasoning_content`, ...
        trainable: for each message, whether the loss may be on it: an assistant's, and not marked `train: false`.
        tools: JSON schemas of the functions the assistant may call.
    """

    messages: list[dict[str, Any]]
    trainable: list[bool]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Completion:
    """Plain text with a part that is given and a part that is learnt; running text has an empty prompt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which the first is preferred (DPO, ORPO)."""

    chosen: Conversation | Completion
    rejected: Conversation | Completion


Example: TypeAlias = Conversation | Completion
"""What a causal language model learns from."""


@dataclass(frozen=True)
class Format:
    """How rows of one kind become examples.

    Args:
        required: columns each row must have.
        optional: columns that are used where they are there.
        template: whether rows go through the chat template; optional: where there is one and it is wanted.
        parse: from a row's values (required and optional ones) and whether the chat template is used.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    template: Literal["always", "optional", "never"]
    parse: Callable[[dict[str, Any], bool], Any]


def parse_row(name: str, values: dict[str, Any], place: str, templated: bool) -> Any:
    """The example that one row holds.

    Args:
        name: format's name.
        values: the row's columns, already renamed.
        place: file and line, for messages.
        templated: prompts and completions are turns of the tokenizer's chat template.

    Raises:
        InputError: a missing column, a null, a wrong type, an unknown role, ...; names place and column.
    """
    format = FORMATS[name]
    missing = [column for column in format.required if column not in values]
    if missing:
        raise InputError(
            f"has no column `{missing[0]}`, which the format {name} needs",
            place=place,
            allowed=" ".join(format.required) + f" ({' '.join(format.optional)})" * bool(format.optional),
            fix=f"the row has {_shown(values)}; name other columns in `columns: {{{missing[0]}: ...}}`",
        )
    known = {column: values[column] for column in (*format.required, *format.optional) if column in values}
    try:
        return format.parse(known, templated)
    except InputError as error:
        raise error.at(place=place) from error


def detect(columns: Collection[str], place: str, task: str = "CAUSAL_LM") -> str:
    """The format of a data set from the columns of its first row.

    Args:
        columns: of that row.
        place: file and line, for messages.
        task: a key of `TASK_FORMATS`: only its formats are looked for.

    Raises:
        InputError: no format fits, or one that another task is trained on.
    """
    own = {name: FORMATS[name] for name in TASK_FORMATS[task]}
    for name, marks in _MARKS.items():
        if name not in own and marks <= set(columns):
            tasks = " or ".join(other for other, formats in TASK_FORMATS.items() if name in formats)
            raise InputError(
                f"has {_shown(marks)}: data for {tasks}, not for {task}",
                place=place,
                fix=f"set {_HOW[tasks]}, or name the format ({' '.join(own)}) if it is meant all the same",
            )
    for name, format in own.items():
        if all(column in columns for column in format.required):
            return name
    wanted = sorted({column for format in own.values() for column in format.required})
    close = next(
        (
            f"`{column}`: did you mean `{near}`? "
            for column in columns
            if column not in wanted and (near := nearest(column, wanted).name)
        ),
        "",
    )
    mapped = ", ".join(f"{name}: NAME" for name in max((format.required for format in own.values()), key=len))
    raise InputError(
        f"no format for {task} has the columns {_shown(columns)}",
        place=place,
        allowed="; ".join(f"{name}: {', '.join(format.required)}" for name, format in own.items()),
        fix=f"{close}say which column is which: `{{path: FILE, columns: {{{mapped}}}}}`",
    )


def _shown(columns: Collection[str]) -> str:
    return printable(", ".join(f"`{column}`" for column in sorted(columns))) or "no columns"


def _tools(values: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The `tools` column: a list of JSON schemas, or the same as a JSON string, as Parquet files have it."""
    tools = values.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = parse_json(tools.encode())
        except ValueError as error:
            raise InputError(f"is {error}", field="tools") from error
    return objects(tools, "tools") if tools else None


def _content(value: Any, column: str) -> str:
    """Text, or OpenAI's list of text parts."""
    if isinstance(value, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            raise InputError("has parts other than text", field=column, fix="only text is trained on")
        return "".join(text(part.get("text"), f"{column}.text") for part in value)
    return text(value, column)


def _message(raw: dict[str, Any], column: str) -> tuple[dict[str, Any], bool]:
    """One turn as templates expect it, and whether it may be trained."""
    message = {key: value for key, value in raw.items() if value is not None}  # Parquet fills absent keys with nulls
    train, weight = message.pop("train", True), message.pop("weight", 1)  # `weight: 0` in OpenAI's fine-tuning files
    if not isinstance(train, bool) or weight not in (0, 1):
        raise InputError("`train` must be true or false, `weight` 0 or 1", field=column)
    role = message.get("role")
    if role not in ROLES:
        problem = "is missing" if role is None else f"is unknown: {printable(role)!r}"
        ours = SHAREGPT_ROLES.get(str(role).lower())
        fix = f"write `{ours}`" if ours else None
        raise InputError(problem, field=f"{column}.role", allowed=" ".join(ROLES), fix=fix)
    calls = message.get("tool_calls")
    if calls:
        message["tool_calls"] = [_call(call, f"{column}.tool_calls") for call in objects(calls, f"{column}.tool_calls")]
        message.setdefault("content", "")
    message["content"] = _content(message.get("content"), f"{column}.content")
    return message, role == "assistant" and train and weight == 1


def _call(call: dict[str, Any], column: str) -> dict[str, Any]:
    """A function call with its arguments as an object: OpenAI writes them as a JSON string, which a template that
    writes JSON would quote a second time."""
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError("names no function", field=column)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments.encode())
        except ValueError:
            return call
        function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _turns(value: Any, column: str) -> list[tuple[dict[str, Any], bool]]:
    """The messages of one column, checked."""
    turns = [_message(raw, f"{column}[{index}]") for index, raw in enumerate(objects(value, column))]
    for index, (message, _) in enumerate(turns):
        if index and message["role"] in OPENING_ROLES:
            raise InputError(
                f"a {message['role']} turn can only come first", field=f"{column}[{index}].role", allowed=_LATER_ROLES
            )
    return turns


def _conversation(turns: list[tuple[dict[str, Any], bool]], values: dict[str, Any]) -> Conversation:
    return Conversation([message for message, _ in turns], [trainable for _, trainable in turns], _tools(values))


def _chat(values: dict[str, Any], templated: bool) -> Example:
    return _conversation(_turns(values["messages"], "messages"), values)


def _sharegpt(values: dict[str, Any], templated: bool) -> Example:
    turns = []
    for index, raw in enumerate(objects(values["conversations"], "conversations")):
        column = f"conversations[{index}]"
        if "from" not in raw or "value" not in raw:
            fix = "columns: {messages: conversations}, in the data source" if {"role", "content"} <= set(raw) else None
            raise InputError(f"has no `from` and `value`, but {_shown(raw)}", field=column, fix=fix)
        role = SHAREGPT_ROLES.get(raw["from"]) if isinstance(raw["from"], str) else None
        if role is None:
            shown, allowed = printable(raw["from"]), " ".join(SHAREGPT_ROLES)
            raise InputError(f"is an unknown role: {shown!r}", field=f"{column}.from", allowed=allowed)
        rest = {key: value for key, value in raw.items() if key not in ("from", "value")}
        turns.append({**rest, "role": role, "content": raw["value"]})
    system = values.get("system")
    opening = [{"role": "system", "content": text(system, "system")}] if system else []
    return _conversation(_turns(opening + turns, "conversations"), values)


ALPACA_PROMPT = (
    "Below is an instruction that describes a task{context}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The prompt of Stanford Alpaca (Taori et al. 2023), which the format is named after."""


def _alpaca(values: dict[str, Any], templated: bool) -> Example:
    instruction, output = text(values["instruction"], "instruction"), text(values["output"], "output")
    given = "" if values.get("input") is None else text(values["input"], "input")
    if templated:
        return _pair(f"{instruction}\n\n{given}" if given else instruction, output, values)
    prompt = ALPACA_PROMPT.format(
        context=", paired with an input that provides further context" if given else "",
        instruction=instruction,
        input=f"### Input:\n{given}\n\n" if given else "",
    )
    return Completion(prompt, output)


def _prompt_completion(values: dict[str, Any], templated: bool) -> Example:
    return _answered(values, "completion", templated)


def _answered(values: dict[str, Any], column: str, templated: bool) -> Example:
    """A prompt and the answer in `column`: two strings, or two lists of messages, of which the answer's are learnt."""
    prompt, completion = values["prompt"], values[column]
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = _turns(prompt + completion, f"prompt + {column}")
        answers = [(message, trainable and index >= len(prompt)) for index, (message, trainable) in enumerate(turns)]
        return _conversation(answers, values)
    prompt, completion = text(prompt, "prompt"), text(completion, column)
    return _pair(prompt, completion, values) if templated else Completion(prompt, completion)


def _pair(question: str, answer: str, values: dict[str, Any]) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages, [False, True], _tools(values))


def _running_text(values: dict[str, Any], templated: bool) -> Example:
    return Completion("", text(values["text"], "text"))


def _preference(values: dict[str, Any], templated: bool) -> Preference:
    """A prompt with two answers, as strings or as messages; or two whole conversations without a prompt."""
    if "prompt" in values:
        chosen, rejected = (_answered(values, name, templated) for name in ("chosen", "rejected"))
    else:
        chosen, rejected = (_conversation(_turns(values[name], name), values) for name in ("chosen", "rejected"))
        if _asked(chosen) != _asked(rejected):
            raise InputError(
                "asks something else than `chosen`: the turns before the first answer differ", field="rejected"
            )
    if chosen == rejected:
        raise InputError("is the same as `chosen`: there is nothing to prefer", field="rejected")
    return Preference(chosen, rejected)


def _asked(conversation: Conversation) -> list[dict[str, Any]]:
    """The turns before the first answer."""
    return list(takewhile(lambda message: message["role"] != "assistant", conversation.messages))


def _source_target(values: dict[str, Any], templated: bool) -> Completion:
    return Completion(text(values["source"], "source"), text(values["target"], "target"))


FORMATS = {
    "chat": Format(("messages",), ("tools",), "always", _chat),
    "sharegpt": Format(("conversations",), ("system", "tools"), "always", _sharegpt),
    "prompt_completion": Format(("prompt", "completion"), ("tools",), "optional", _prompt_completion),
    "alpaca": Format(("instruction", "output"), ("input",), "optional", _alpaca),
    "text": Format(("text",), (), "never", _running_text),
    "preference": Format(("chosen", "rejected"), ("prompt", "tools"), "optional", _preference),
    "seq2seq": Format(("source", "target"), (), "never", _source_target),
    "classification": Format(("text", "label"), ("text_pair",), "never", task_formats.classification),
    "tokens": Format(("tokens", "tags"), (), "never", task_formats.tokens),
    "qa": Format(("question", "context", "answers"), (), "never", task_formats.question),
    "pairs": Format(("anchor", "positive"), (), "never", task_formats.pair),
}

TASK_FORMATS = {
    "CAUSAL_LM": ("chat", "sharegpt", "prompt_completion", "alpaca", "text"),
    "preference": ("preference",),
    "SEQ_2_SEQ_LM": ("seq2seq", "prompt_completion"),
    "SEQ_CLS": ("classification",),
    "TOKEN_CLS": ("tokens",),
    "QUESTION_ANS": ("qa",),
    "FEATURE_EXTRACTION": ("pairs",),
}
"""By task type, or for preference training, the formats in the order in which they are tried."""

_MARKS = {
    "preference": {"chosen", "rejected"},
    "classification": {"text", "label"},
    "qa": {"question", "context", "answers"},
    "tokens": {"tokens", "tags"},
    "pairs": {"anchor", "positive"},
}
"""Columns that tell data of another task, though a format of this one might fit as well."""

_HOW = {task: f"model.task_type: {task}" for task in TASK_FORMATS} | {"preference": "a `preference:` section"}
