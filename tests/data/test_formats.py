"""What rows mean, and what each bad row is told."""

from __future__ import annotations

import pytest

from peftcli.data.formats import FORMATS, TASK_FORMATS, Completion, Conversation, detect, parse_row
from peftcli.errors import InputError

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}
PAIR = Conversation([USER, ASSISTANT], [False, True])
SYSTEM = {"role": "system", "content": "be"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]

ACCEPTED = [
    ("chat", True, {"messages": [USER, ASSISTANT]}, PAIR),
    (
        "chat",
        True,
        {"messages": [USER, {**ASSISTANT, "train": False}]},
        Conversation([USER, ASSISTANT], [False, False]),
    ),
    ("chat", True, {"messages": [USER, {**ASSISTANT, "weight": 0}]}, Conversation([USER, ASSISTANT], [False, False])),
    ("chat", True, {"messages": [{**USER, "name": None}, {**ASSISTANT, "train": None}]}, PAIR),
    ("chat", True, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ASSISTANT]}, PAIR),
    (
        "chat",
        True,
        {"messages": [USER, ASSISTANT], "tools": TOOLS},
        Conversation([USER, ASSISTANT], [False, True], TOOLS),
    ),
    ("chat", True, {"messages": [USER, ASSISTANT], "tools": "[]"}, PAIR),
    ("chat", True, {"messages": [USER, ASSISTANT], "tools": None}, PAIR),
    ("sharegpt", True, {"conversations": [HUMAN, GPT]}, PAIR),
    (
        "sharegpt",
        True,
        {"conversations": [HUMAN, {**GPT, "train": False}], "system": "be"},
        Conversation([SYSTEM, USER, ASSISTANT], [False, False, False]),
    ),
    ("prompt_completion", True, {"prompt": "hi", "completion": "yes"}, PAIR),
    ("prompt_completion", False, {"prompt": "hi", "completion": "yes"}, Completion("hi", "yes")),
    (
        "prompt_completion",
        True,
        {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
        Conversation([USER, ASSISTANT, USER, ASSISTANT], [False, False, False, True]),
    ),
    ("alpaca", True, {"instruction": "hi", "input": "", "output": "yes"}, PAIR),
    (
        "alpaca",
        True,
        {"instruction": "add", "input": "1 2", "output": "3"},
        Conversation([{"role": "user", "content": "add\n\n1 2"}, {"role": "assistant", "content": "3"}], [False, True]),
    ),
    (
        "alpaca",
        False,
        {"instruction": "add", "input": "1 2", "output": "3"},
        Completion(
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
            "response that appropriately completes the request.\n\n### Instruction:\nadd\n\n### Input:\n1 2\n\n"
            "### Response:\n",
            "3",
        ),
    ),
    ("text", False, {"text": "hi"}, Completion("", "hi")),
]


@pytest.mark.parametrize(("name", "templated", "values", "expected"), ACCEPTED)
def test_rows_become_examples(name, templated, values, expected):
    assert parse_row(name, values, "here", templated) == expected


CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_tool_calls_lose_their_second_quoting():
    """OpenAI writes arguments as a JSON string; a template that writes JSON would quote it again."""
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "2"}]
    example = parse_row("chat", {"messages": messages}, "here", True)
    assert example.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    assert example.messages[1]["content"] == ""
    assert example.trainable == [False, True, False]


REFUSED = [
    ("chat", {"text": "x"}, r"has no column `messages`.*\n.*\n.*the row has `text`"),
    ("chat", {"messages": "hello"}, "messages: must be a list of objects, but is 'hello'"),
    ("chat", {"messages": []}, "messages: is an empty list"),
    ("chat", {"messages": ["hello"]}, "messages: must be a list of objects"),
    ("chat", {"messages": [USER, {"role": "robot", "content": "x"}]}, r"messages\[1\]\.role: is unknown: 'robot'"),
    ("chat", {"messages": [{"content": "x"}]}, r"messages\[0\]\.role: is missing"),
    ("chat", {"messages": [{"role": "gpt", "content": "x"}]}, r"role: is unknown: 'gpt'[\s\S]*write `assistant`"),
    ("chat", {"messages": None}, "messages: must be a list of objects, but is null"),
    ("chat", {"messages": [USER, SYSTEM]}, r"messages\[1\]\.role: a system turn can only come first"),
    ("chat", {"messages": [{"role": "user"}]}, r"messages\[0\]\.content: must be a string, but is null"),
    (
        "chat",
        {"messages": [{"role": "user", "content": 3}]},
        r"messages\[0\]\.content: must be a string, but is a number",
    ),
    ("chat", {"messages": [{**USER, "content": [{"type": "image"}]}]}, "has parts other than text"),
    ("chat", {"messages": [USER, {**ASSISTANT, "train": "no"}]}, "`train` must be true or false"),
    ("chat", {"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "`weight` 0 or 1"),
    ("chat", {"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]}, r"messages\[1\]\.tool_calls: names no function"),
    ("chat", {"messages": [USER, ASSISTANT], "tools": "{"}, "tools: is not valid JSON"),
    ("chat", {"messages": [USER, ASSISTANT], "tools": {"f": 1}}, "tools: must be a list of objects"),
    (
        "sharegpt",
        {"conversations": [USER]},
        r"conversations\[0\]: has no `from` and `value`, but `content`, `role`\n.*columns: {messages: conversations}",
    ),
    ("preference", {"prompt": "p", "chosen": None, "rejected": "a"}, "chosen: must be a string, but is null"),
    ("preference", {"prompt": "p", "chosen": "b", "rejected": ["a"]}, "rejected: must be a string, but is a list"),
    ("qa", {"question": "q", "context": "a", "answers": {"text": [""], "answer_start": [0]}}, "answers.text: is empty"),
    ("sharegpt", {"conversations": [{"from": "robot", "value": ""}]}, r"conversations\[0\]\.from: is an unknown role"),
    ("sharegpt", {"conversations": [{"from": ["x"], "value": ""}]}, r"conversations\[0\]\.from: is an unknown role"),
    ("sharegpt", {"conversations": [HUMAN, GPT], "system": 3}, "system: must be a string"),
    ("prompt_completion", {"prompt": "x", "completion": None}, "completion: must be a string, but is null"),
    ("prompt_completion", {"prompt": 1, "completion": "x"}, "prompt: must be a string, but is a number"),
    ("prompt_completion", {"prompt": "x"}, "has no column `completion`"),
    ("prompt_completion", {"prompt": [USER], "completion": [SYSTEM]}, "a system turn can only come first"),
    ("prompt_completion", {"prompt": [USER], "completion": "x"}, "prompt: must be a string, but is a list"),
    ("alpaca", {"instruction": "x", "output": "y", "input": 1}, "input: must be a string"),
    ("alpaca", {"instruction": "x", "output": "y", "input": 0}, "input: must be a string"),
    ("chat", {"messages": [USER, ASSISTANT], "tools": '[{"a": NaN}]'}, "tools: is not valid JSON: `the text` holds"),
    ("chat", {"messages": [USER, ASSISTANT], "tools": "[" * 100_000}, "tools: is nested too deeply"),
    (
        "preference",
        {"chosen": [USER, ASSISTANT], "rejected": [ASSISTANT]},
        "rejected: asks something else than `chosen`",
    ),
    ("text", {"text": "\ud800"}, "text: holds half a surrogate pair at character 0"),
    ("text", {"text": {}}, "text: must be a string, but is an object"),
    ("classification", {"text": " ", "label": 1}, "text: holds nothing but blanks"),
    ("classification", {"text": "x", "label": 1.5}, "label: must be a word or a whole number, but is 1.5"),
    ("classification", {"text": "x", "label": ""}, "label: is an empty label"),
    ("classification", {"text": "x"}, "has no column `label`"),
    ("tokens", {"tokens": ["a", "b"], "tags": ["O"]}, "tags: has 1 entries for 2 tokens"),
    ("tokens", {"tokens": "a b", "tags": ["O"]}, "tokens: must be a list"),
    ("tokens", {"tokens": ["a"], "tags": [None]}, r"tags\[0\]: must be a string, but is null"),
    (
        "qa",
        {"question": "q", "context": "a b", "answers": {"text": ["b"], "answer_start": [0]}},
        "holds 'a' at character 0",
    ),
    (
        "qa",
        {"question": "q", "context": "a", "answers": {"text": ["a"], "answer_start": ["0"]}},
        "must be a whole number",
    ),
    ("qa", {"question": "q", "context": "a", "answers": "a"}, "must have `text` and `answer_start`"),
    ("qa", {"question": "q", "context": "a", "answers": {"text": ["a"], "answer_start": []}}, "1 texts and 0 starts"),
    ("pairs", {"anchor": "a", "positive": ""}, "positive: holds nothing but blanks"),
    ("preference", {"prompt": "p", "chosen": "a", "rejected": "a"}, "rejected: is the same as `chosen`"),
    ("preference", {"chosen": "a", "rejected": "b"}, "chosen: must be a list of objects"),
    ("seq2seq", {"source": 3, "target": "b"}, "source: must be a string"),
]


@pytest.mark.parametrize(("name", "values", "message"), REFUSED)
def test_bad_rows_are_refused_by_place_and_column(name, values, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_row(name, values, "rows.jsonl:7", True)
    assert str(caught.value).startswith("rows.jsonl:7")


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in TASK_FORMATS.items() for name in names])
def test_each_format_is_detected_by_its_columns(task, name):
    assert detect({*FORMATS[name].required, *FORMATS[name].optional, "image"}, "here", task) == name


@pytest.mark.parametrize(
    ("task", "name"), [(task, names[0]) for task, names in TASK_FORMATS.items() if task != "CAUSAL_LM"]
)
def test_data_of_another_task_are_refused_with_what_to_set(task, name):
    with pytest.raises(
        InputError, match="preference:" if task == "preference" else f"model.task_type: {task}|no format for CAUSAL_LM"
    ):
        detect(FORMATS[name].required, "here")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["question", "answer"], r"no format for CAUSAL_LM has the columns `answer`, `question`"),
        (["promt", "completion"], r"`promt`: did you mean `prompt`\?"),
        (["prompt", "chosen", "rejected"], "data for preference, not for CAUSAL_LM"),
        (["text", "label"], "data for SEQ_CLS, not for CAUSAL_LM"),
        ([], "no columns"),
    ],
)
def test_unknown_columns_are_refused(columns, message):
    with pytest.raises(InputError, match=message):
        detect(columns, "here")


def test_a_column_that_is_right_is_not_suggested_for_itself():
    with pytest.raises(InputError) as caught:
        detect(["instruction", "respons"], "here")
    assert "did you mean" not in str(caught.value)
    with pytest.raises(InputError, match="`promt`: did you mean `prompt`"):
        detect(["completion", "promt"], "here")
