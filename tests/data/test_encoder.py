"""Golden tokens and masks: what each family's template writes, with what is learnt in angle quotes."""

from __future__ import annotations

import pytest

from data import families
from data.families import CHATML_TOOLS, byte_level, family, marked
from peftcli.data.encoder import Encoder
from peftcli.data.formats import Completion, Conversation
from peftcli.errors import InputError


def turns(*contents: str, system: str | None = None) -> Conversation:
    """User and assistant turns by turns; one that begins with `-` is marked `train: false`."""
    messages = [{"role": "system", "content": system}] if system else []
    trainable = [False] * len(messages)
    for index, content in enumerate(contents):
        messages.append({"role": "assistant" if index % 2 else "user", "content": content.removeprefix("-")})
        trainable.append(index % 2 == 1 and not content.startswith("-"))
    return Conversation(messages, trainable)


ONE = turns("hello", "how are you?")
TWO = turns("hello", "fine thanks", "what is 2?", "4")
SYSTEM = turns("hello", "fine", system="think")
FIRST_UNTRAINED = turns("hello", "-fine thanks", "what is 2?", "4")
REASONED = turns("hello", "how</think>fine", "what is 2?", "think</think>4")

GOLDEN = [
    (
        "chatml",
        "assistant",
        SYSTEM,
        "<|im_start|>system\nthink<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n«fine<|im_end|>»\n",
    ),
    (
        "chatml",
        "assistant",
        TWO,
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n«fine thanks<|im_end|>»\n"
        "<|im_start|>user\nwhat is 2?<|im_end|>\n<|im_start|>assistant\n«4<|im_end|>»\n",
    ),
    (
        "chatml",
        "assistant",
        FIRST_UNTRAINED,
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nfine thanks<|im_end|>\n"
        "<|im_start|>user\nwhat is 2?<|im_end|>\n<|im_start|>assistant\n«4<|im_end|>»\n",
    ),
    ("chatml", "all", ONE, "<|im_start|>«user\nhello<|im_end|>\n<|im_start|>assistant\nhow are you?<|im_end|>\n»"),
    (
        "llama3",
        "assistant",
        TWO,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«fine thanks<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nwhat is 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«4<|eot_id|>»",
    ),
    (
        "llama3",
        "last_assistant",
        TWO,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nfine thanks<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwhat is 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«4<|eot_id|>»",
    ),
    (
        "gemma",
        "assistant",
        TWO,
        "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n«fine thanks<end_of_turn>»\n"
        "<start_of_turn>user\nwhat is 2?<end_of_turn>\n<start_of_turn>model\n«4<end_of_turn>»\n",
    ),
    (
        "mistral",
        "assistant",
        TWO,
        "<s>[INST]  hello[/INST]«  fine thanks</s>»[INST]  what is 2?[/INST]«  4</s>»",
    ),
    (  # Phi ends a whole conversation with its end of text, and each turn with <|end|>: only that is learnt
        "phi",
        "assistant",
        TWO,
        "<|user|>\nhello<|end|>\n<|assistant|>\n«fine thanks<|end|>»\n"
        "<|user|>\nwhat is 2?<|end|>\n<|assistant|>\n«4<|end|>»\n<|endoftext|>",
    ),
    (  # the generation prompt opens a thought; answers without one still begin at the right place
        "thinking",
        "assistant",
        ONE,
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n«how are you?<|im_end|>»\n",
    ),
    (  # also where their first characters are those of the thought's mark
        "thinking",
        "assistant",
        turns("hello", "<the/>"),
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n«<the/><|im_end|>»\n",
    ),
    ("plain", "assistant", turns("hello", "fine"), "user: hello\nassistant:« fine\n»"),
]


@pytest.mark.parametrize(("name", "loss_on", "conversation", "expected"), GOLDEN)
def test_golden_masks(name, loss_on, conversation, expected):
    tokenizer = family(name)
    samples = Encoder(tokenizer, loss_on).encode(conversation, "here")
    assert marked(tokenizer, samples) == [expected]
    assert samples[0][0].tolist() == tokenizer.apply_chat_template(conversation.messages, return_dict=False)


FAMILIES = ["chatml", "llama3", "gemma", "mistral", "phi", "qwen3", "thinking", "harmony"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("conversation", [ONE, TWO, REASONED])
def test_each_answer_is_learnt_from_exactly_what_the_model_is_given_later(name, conversation):
    """Whatever the template does, what comes before an answer is the prompt at inference, and it ends with a stop."""
    tokenizer = family(name)
    encoder = Encoder(tokenizer, "assistant")
    prompts = []
    for index in (1, 3)[: len(conversation.messages) // 2]:
        ids = tokenizer.apply_chat_template(
            conversation.messages[:index], add_generation_prompt=True, return_dict=False
        )
        prompts.append(ids)
    answers = 0
    for ids, supervised in encoder.encode(conversation, "here"):
        learnt = supervised.nonzero()[0].tolist()
        starts = [index for index in learnt if not supervised[index - 1]]
        ends = [index for index in learnt if not supervised[index + 1 : index + 2].any()]
        assert all(int(ids[index]) in tokenizer.added_tokens_decoder for index in ends)
        if name != "thinking":
            assert all(ids[:start].tolist() in prompts for start in starts)
        answers += len(starts)
    assert answers == len(prompts)


def test_a_template_that_drops_reasoning_makes_a_sample_of_each_answer():
    """Qwen3's kind: an answer loses its thoughts once another question follows."""
    tokenizer = family("qwen3")
    encoder = Encoder(tokenizer, "assistant")
    assert marked(tokenizer, encoder.encode(REASONED, "here")) == [
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n«how</think>fine<|im_end|>»\n",
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nfine<|im_end|>\n"
        "<|im_start|>user\nwhat is 2?<|im_end|>\n<|im_start|>assistant\n«think</think>4<|im_end|>»\n",
    ]
    assert (encoder.notes.rewritten, encoder.notes.first["rewritten"]) == (1, "here")


def test_a_template_with_another_end_for_the_last_turn_makes_a_sample_of_each_answer():
    tokenizer = family("harmony")
    samples = marked(tokenizer, Encoder(tokenizer, "assistant").encode(TWO, "here"))
    assert [sample[sample.index("«") :] for sample in samples] == [
        "«<|message|>fine thanks<|return|>»",
        "«<|message|>4<|return|>»",
    ]


def test_loss_on_completion_is_every_answer_behind_the_last_question():
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": "what is 2?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 2}}}]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "4"},
    ]
    conversation = Conversation(messages, [m["role"] == "assistant" for m in messages], [{"name": "f"}])
    tokenizer = family("chatml_tools")
    head = (
        '<|im_start|>system\n{"name": "f"}<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n'
        "fine<|im_end|>\n<|im_start|>user\nwhat is 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    call = '<tool_call>{"name": "f", "arguments": {"a": 2}}</tool_call><|im_end|>'
    tail = "\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n«4<|im_end|>»\n"
    completion = Encoder(tokenizer, "completion").encode(conversation, "here")
    assert marked(tokenizer, completion) == [f"{head}«{call}»{tail}"]
    last = Encoder(tokenizer, "last_assistant").encode(conversation, "here")
    assert marked(tokenizer, last) == [f"{head}{call}{tail}"]


def test_pad_that_is_eos_keeps_its_label():
    tokenizer = family("chatml")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    [(ids, supervised)] = Encoder(tokenizer, "assistant").encode(ONE, "here")
    assert int(ids[supervised][-1]) == tokenizer.eos_token_id


PLAIN = [
    ("base", "assistant", "", "<|endoftext|>hello« world<|endoftext|>»"),  # bos, eos and pad in one
    ("base", "all", "", "<|endoftext|>«hello world<|endoftext|>»"),
    ("llama3", "completion", "", "<|begin_of_text|>hello« world<|eot_id|>»"),
    ("llama3", "completion", "<|begin_of_text|>", "<|begin_of_text|>hello« world<|eot_id|>»"),  # never two
    ("gemma", "assistant", "", "<bos>hello« world<eos>»"),
    ("mistral", "last_assistant", "", "<s> hello« world</s>»"),
    ("chatml", "assistant", "", "hello« world<|im_end|>»"),
]


@pytest.mark.parametrize(("name", "loss_on", "before", "expected"), PLAIN)
def test_plain_prompt_and_completion(name, loss_on, before, expected):
    tokenizer = family(name)
    samples = Encoder(tokenizer, loss_on).encode(Completion(before + "hello", " world"), "here")
    assert marked(tokenizer, samples) == [expected]


def test_running_text_is_learnt_whole_and_its_own_end_is_not_doubled():
    tokenizer = family("gemma")
    encode = Encoder(tokenizer, "assistant").encode
    assert marked(tokenizer, encode(Completion("", "hello world"), "here")) == ["<bos>«hello world<eos>»"]
    assert marked(tokenizer, encode(Completion("", "hello<eos>"), "here")) == ["<bos>«hello<eos>»"]


def test_a_token_over_the_border_belongs_to_the_answer_and_is_noted():
    tokenizer = family("base")
    encoder = Encoder(tokenizer, "assistant")
    assert marked(tokenizer, encoder.encode(Completion("hello wo", "rld"), "here")) == [
        "<|endoftext|>hello« world<|endoftext|>»"
    ]
    assert encoder.notes.merged == 1


def test_text_that_spells_control_tokens_is_counted():
    encoder = Encoder(family("chatml"), "assistant")
    encoder.encode(turns("hello <|im_end|> you", "fine <|im_end|>"), "file:3")
    assert encoder.notes.control_tokens == {"<|im_end|>": 2}
    assert encoder.notes.first["control_tokens"] == "file:3"


def test_blank_answers_are_not_learnt():
    encoder = Encoder(family("chatml"), "assistant")
    assert encoder.encode(turns("hello", " \n"), "here") == []
    assert encoder.encode(Completion("hello", " \n"), "here") == []
    [(_, supervised)] = encoder.encode(turns("hello", " ", "how are you?", "fine"), "here")
    [(_, without)] = encoder.encode(turns("hello", "- ", "how are you?", "fine"), "here")
    assert supervised.tolist() == without.tolist()
    assert encoder.notes.blanks == 1


def test_an_assistant_turn_that_opens_the_conversation_is_context():
    tokenizer = family("chatml")
    encoder = Encoder(tokenizer, "assistant")
    messages = [{"role": "assistant", "content": "hello"}, *TWO.messages]
    samples = encoder.encode(Conversation(messages, [True, *TWO.trainable]), "here")
    assert marked(tokenizer, samples)[0].startswith("<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\n")
    assert (marked(tokenizer, samples)[0].count("«"), encoder.notes.openings) == (2, 1)


@pytest.mark.parametrize(
    ("answer", "learnt"),
    [
        ("fine <|im_start|>", "«fine <|im_start|><|im_end|>»\n"),
        ("fine <|im_start|><|im_start|> ", "«fine <|im_start|><|im_start|> <|im_end|>»\n"),
        ("fine<|im_end|>", "«fine<|im_end|>»<|im_end|>\n"),
    ],
)
def test_control_tokens_that_an_answer_ends_with_are_its_words_and_its_end_is_still_learnt(answer: str, learnt: str):
    tokenizer = family("chatml")
    (sample,) = Encoder(tokenizer, "assistant").encode(turns("hello", answer), "here")
    assert marked(tokenizer, [sample])[0].partition("assistant\n")[2] == learnt


def test_a_template_without_end_of_turn_does_not_end_at_a_control_token_of_the_answer():
    tokenizer = byte_level(families.PLAIN, ("<file>", "</s>"), eos="</s>")
    encoder = Encoder(tokenizer, "assistant")
    assert marked(tokenizer, encoder.encode(turns("hello", "cat <file>"), "here")) == [
        "user: hello\nassistant: «cat <file>\n»"
    ]
    assert encoder.notes.terminators == {None: 1}
    assert marked(tokenizer, encoder.encode(turns("hello", "cat <file></s>"), "here")) == [
        "user: hello\nassistant: «cat <file></s>»\n"
    ], "the end token is meant"
    assert encoder.notes.terminators == {None: 1, "</s>": 1}


def test_a_tool_call_stands_between_a_content_and_its_end_of_turn():
    tokenizer = byte_level(CHATML_TOOLS, ("<|im_start|>", "<|im_end|>", "<file>"), eos="<|im_end|>")
    messages = turns("hello", "cat <file>").messages
    messages[1]["tool_calls"] = [{"function": {"name": "f", "arguments": {}}}]
    [sample] = marked(tokenizer, Encoder(tokenizer, "assistant").encode(Conversation(messages, [False, True]), "here"))
    assert sample.endswith("</tool_call><|im_end|>»\n")


@pytest.mark.parametrize("where", ["arguments", "tools"])
def test_half_a_surrogate_pair_is_refused_wherever_it_hides(where: str):
    messages = turns("hello", "").messages
    messages[1]["tool_calls"] = [
        {"function": {"name": "f", "arguments": {"a": "\ud83d" if where == "arguments" else ""}}}
    ]
    conversation = Conversation(messages, [False, True], [{"name": "\ud83d"}] if where == "tools" else None)
    with pytest.raises(InputError, match=r"rows\.jsonl:7: messages: holds half a surrogate pair"):
        Encoder(family("chatml_tools"), "assistant").encode(conversation, "rows.jsonl:7")


def test_ends_are_counted():
    encoder = Encoder(family("chatml"), "assistant")
    encoder.encode(TWO, "here")
    assert encoder.notes.terminators == {"<|im_end|>": 2}
    endless = Encoder(family("plain"), "assistant")
    endless.encode(TWO, "here")
    assert endless.notes.terminators == {None: 2}


REFUSED = [
    ("chatml", "assistant", Conversation([{"role": "user", "content": "hello"}], [False]), "no assistant turn"),
    ("chatml", "assistant", turns("hello", "-fine"), "no assistant turn that is learnt with loss_on: assistant"),
    ("chatml", "last_assistant", turns("hello", "fine", "hello", "-fine"), "with loss_on: last_assistant"),
    ("base", "assistant", ONE, "the tokenizer has no chat template"),
    ("gemma", "assistant", SYSTEM, "chat template fails: System role not supported"),
    ("gemma", "assistant", turns("hello", "fine", "hello", system=None), None),
    ("mistral", "assistant", SYSTEM, "writes the turns before turn 3 differently"),
    ("amnesic", "assistant", ONE, "writes the turns before turn 2 differently"),
]


@pytest.mark.parametrize(("name", "loss_on", "conversation", "message"), REFUSED)
def test_refusals_name_the_row(name, loss_on, conversation, message):
    encoder = Encoder(family(name), loss_on)
    if message is None:
        assert encoder.encode(conversation, "rows.jsonl:7")
        return
    with pytest.raises(InputError, match=message) as caught:
        encoder.encode(conversation, "rows.jsonl:7")
    assert caught.value.place == "rows.jsonl:7"


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{% for %}", "{{ nothing.at.all }}"],
)
def test_a_template_that_breaks_out_or_breaks_down_is_refused_by_name(template):
    tokenizer = family("chatml")
    own, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        with pytest.raises(InputError, match="chat template fails"):
            Encoder(tokenizer, "assistant").encode(ONE, "here")
    finally:
        tokenizer.chat_template = own


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match=r"does not say which characters.*\n.*tokenizer\.json"):
        Encoder(Slow(), "assistant")
