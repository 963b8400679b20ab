"""From sources to the run folder: what is kept, what is cut, what is held out, what is said and what is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import astuple

import pytest

from data.families import family, marked
from peftcli.data.audit import require_sound
from peftcli.data.prepare import prepare
from peftcli.data.tokens import TokenDataset
from peftcli.errors import InputError
from peftcli.recipe.schema import DataSection

WORDS = [
    "hello",
    "world",
    "how",
    "are",
    "you",
    "fine",
    "thanks",
    "the",
    "answer",
    "is",
    "what",
    "think",
    "tool",
    "question",
]


def pairs(count, answer="{}"):
    return [{"prompt": f"question {index}", "completion": answer.format(WORDS[index % 14])} for index in range(count)]


@pytest.fixture
def source(tmp_path):
    """Writes rows to a file and gives its path."""

    def write(rows, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def run(tmp_path):
    """Calls `prepare` with the fields of a data section."""

    def call(tokenizer=None, seed=0, vocab_size=None, progress=None, **fields):
        data = DataSection.model_validate(fields)
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        call.folder = folder
        tokenizer = tokenizer or family("chatml")
        return prepare(data, tokenizer, folder=folder, seed=seed, vocab_size=vocab_size, progress=progress)

    return call


def seen(prepared, name):
    """What the audit says of one fact."""
    return next(fact.seen for fact in prepared.report.audit if fact.name == name)


def wrong(prepared):
    """The facts a run is refused for."""
    return {fact.name: fact.seen for fact in prepared.report.audit if not fact.ok}


def contents(dataset):
    return [(ids.tolist(), mask.tolist()) for ids, mask in (dataset[index] for index in range(len(dataset)))]


def test_the_run_folder_holds_what_is_returned(source, run):
    prepared = run(train=source(pairs(40)), eval={"split": 0.1})
    assert sorted(file.name for file in run.folder.iterdir()) == [
        "audit.json",
        "eval.safetensors",
        "train.safetensors",
    ]
    for name, part in (("train", prepared.train), ("eval", prepared.eval)):
        assert contents(TokenDataset.load(run.folder / f"{name}.safetensors")) == contents(part)
    report = json.loads((run.folder / "audit.json").read_text())
    assert (report["train"]["samples"], report["eval"]["samples"]) == (36, 4)
    assert report["train"]["tokens"] == int(prepared.train.lengths.sum())
    assert report["train"]["supervised_tokens"] == int(prepared.train.label_counts.sum())
    assert sum(report["train"]["lengths"].values()) == 36
    run(train=source(pairs(40)))
    assert sorted(file.name for file in run.folder.iterdir()) == ["audit.json", "train.safetensors"]


def test_prompts_become_turns_unless_told_otherwise(source, run):
    path = source([{"prompt": "hello", "completion": " fine"}])
    tokenizer = family("chatml")
    prepared = run(train=path)
    assert marked(tokenizer, [prepared.train[0]]) == [
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n« fine<|im_end|>»\n"
    ]
    assert prepared.report.train.sources[0].templated
    prepared = run(train=path, apply_chat_template=False)
    assert marked(tokenizer, [prepared.train[0]]) == ["hello« fine<|im_end|>»"]
    assert not prepared.report.train.sources[0].templated
    assert seen(prepared, "chat template") == "none: plain text"


def test_a_split_is_deterministic_and_shares_no_example(source, run):
    rows = pairs(30) * 2
    one, again, other = (run(train=source(rows), eval={"split": 0.2}, seed=seed) for seed in (1, 1, 2))
    assert contents(one.eval) == contents(again.eval) != contents(other.eval)
    assert one.report.overlap == 0
    assert (len(one.train), len(one.eval)) == (48, 12)
    assert one.report.train.duplicates == 24


def test_the_same_rows_in_both_parts_are_counted(source, run):
    prepared = run(train=source(pairs(10)), eval=source(pairs(14)[7:], "eval.jsonl"))
    assert prepared.report.overlap == 3
    assert wrong(prepared) == {"evaluation apart": "evaluation rows that are training rows: 3 of 7"}


def test_weights_repeat_and_thin_out(source, run):
    first = {"path": source(pairs(10), "first.jsonl"), "weight": 2.5}
    second = {"path": source(pairs(20, "{} thanks"), "second.jsonl"), "weight": 0.25, "max_samples": 8}
    prepared = run(train=[first, second], eval={"split": 0.01})
    assert [(report.rows, report.samples) for report in prepared.report.train.sources] == [(10, 10), (8, 8)]
    held_out_of_first = any("thanks" not in text for text in marked(family("chatml"), [prepared.eval[0]]))
    assert len(prepared.train) == (9 * 2 + 4 + 2 if held_out_of_first else 25 + 2)
    with pytest.raises(InputError, match=r"data\.train: the weights of the sources leave no sample"):
        run(train=[{**first, "weight": 0.01}])


LONG = [{"text": "hello world " * 20}, {"text": "fine"}]
SHORTEST, LONGEST = (len(family("chatml")(row["text"]).input_ids) + 1 for row in reversed(LONG))


@pytest.mark.parametrize(
    ("overflow", "lengths", "warning"),
    [
        ("drop", [], "samples longer than data.max_length, left out: 1"),
        ("truncate", [16], "samples longer than data.max_length, cut: 1"),
        ("split", [16, 16, 16, LONGEST - 48], "samples longer than data.max_length, cut: 1"),
    ],
)
def test_overflow(source, run, overflow, lengths, warning):
    prepared = run(train=source(LONG), max_length=16, overflow=overflow)
    assert prepared.train.lengths.tolist() == [*lengths, SHORTEST]
    assert (prepared.train.label_counts == prepared.train.lengths - 1).all()
    assert warning in prepared.report.warnings[0]


def test_too_long_is_an_error_unless_told_otherwise(source, run):
    with pytest.raises(InputError, match=rf"train\.jsonl:1: .*longer than 16 tokens: 1, the longest {LONGEST}"):
        run(train=source(LONG), max_length=16)
    assert list(run.folder.iterdir()) == []


def test_a_cut_that_leaves_no_label_drops_the_sample(source, run):
    rows = [{"prompt": "hello world " * 20, "completion": "fine"}, *pairs(1)]
    prepared = run(train=source(rows), max_length=40, overflow="truncate")
    assert len(prepared.train) == 1
    assert "samples without a learnt token once cut, left out: 1" in prepared.report.warnings[1]
    with pytest.raises(InputError, match="of 1 rows, 1 without a learnt token once cut"):
        run(train=source(rows[:1]), max_length=40, overflow="truncate")


def test_blank_completions_are_left_out_and_counted(source, run):
    rows = [*pairs(3), {"prompt": "x", "completion": ""}, {"prompt": "x", "completion": " "}]
    prepared = run(train=source(rows))
    assert len(prepared.train) == 3
    assert prepared.report.warnings == [f"{source(rows)}: rows with nothing but blanks to learn, left out: 2"]
    with pytest.raises(InputError, match="no token is left to learn: of 2 rows, 2 with nothing but blanks"):
        run(train=source(rows[3:]))


REFUSED = [
    ([], {}, r"data\.train: is empty: it has no rows"),
    ([{"text": "x"}, {"prompt": "x"}], {}, r":2: data\.train: has no column `text`"),
    ([{"prompt": "x", "completion": None}], {}, r":1: data\.train: completion: must be a string"),
    ([{"messages": [{"role": "user", "content": "x"}]}], {}, r":1: data\.train: messages: has no assistant turn"),
    (pairs(3), {"format": "chat"}, r":1: data\.train: has no column `messages`"),
    (pairs(1) * 3, {"eval": {"split": 0.5}}, r"data\.eval\.split: a data set of one row can't be split"),
]


@pytest.mark.parametrize(("rows", "fields", "message"), REFUSED)
def test_refusals_name_file_line_and_field_and_write_nothing(source, run, rows, fields, message):
    with pytest.raises(InputError, match=message):
        run(train=source(rows), **fields)
    assert list(run.folder.iterdir()) == []


def test_a_token_the_model_does_not_embed_is_refused(source, run):
    tokenizer = copy.deepcopy(family("chatml"))
    tokenizer.add_tokens(["extra"])
    size = tokenizer.vocab_size
    assert run(tokenizer, vocab_size=size, train=source(pairs(3)))
    with pytest.raises(InputError, match=f"holds the token 'extra' with id {size}, but the model embeds only {size}"):
        run(tokenizer, vocab_size=size, train=source([{"text": "extra"}]))


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (
            "llama3",
            [
                "samples that begin with <|begin_of_text|>: 2",
                "answers end with <|eot_id|> (2)",
                "the tokenizer has none: <|eot_id|> fills up, its labels stay",
                "the tokenizer's own",
            ],
        ),
        (
            "chatml",
            [
                "no sample begins with one, as the tokenizer and its template write none",
                "answers end with <|im_end|> (2)",
                "<|im_end|>, also the end of sequence: told apart by position, its labels stay",
                "the tokenizer's own",
            ],
        ),
        (
            "gemma",
            [
                "samples that begin with <bos>: 2",
                "answers end with <end_of_turn> (2)",
                "<pad>, not an end of sequence",
                "the tokenizer's own",
            ],
        ),
    ],
)
def test_audit(source, run, name, facts):
    prepared = run(family(name), train=source(pairs(2)))
    assert [fact.seen for fact in prepared.report.audit][: len(facts)] == facts
    assert all(fact.ok for fact in prepared.report.audit)
    require_sound(prepared.report)


def test_audit_finds_what_is_wrong(source, run):
    endless = run(family("plain"), train=source(pairs(2))).report
    assert [fact.name for fact in endless.audit if not fact.ok] == ["end of turn is learnt"]
    rows = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}]
    tokenizer = family("gemma")
    own, tokenizer.chat_template = tokenizer.chat_template, "{{ bos_token }}" + tokenizer.chat_template
    doubled = run(tokenizer, train=source(rows)).report
    tokenizer.chat_template = own
    assert [fact.seen for fact in doubled.audit if not fact.ok] == ["samples that begin with <bos> twice: 1"]


def test_repeated_rows_are_told_and_pass(source, run):
    prepared = run(train=source(pairs(4) * 3))
    assert seen(prepared, "duplicates") == "training rows that repeat an earlier one: 8 of 12"
    assert not wrong(prepared)


@pytest.mark.parametrize(("blank", "refused"), [(3, False), (4, True)])
def test_audit_refuses_mostly_blank_data(source, run, blank, refused):
    prepared = run(train=source(pairs(3) + [{"prompt": "x", "completion": " "}] * blank))
    said = f"rows with nothing but blanks: {blank} of {3 + blank}"
    assert seen(prepared, "something to learn") == said
    if refused:
        with pytest.raises(InputError, match=f"(?s)data: the audit found .*: something to learn: {said}.*--no-audit"):
            require_sound(prepared.report)
    else:
        require_sound(prepared.report)


def test_an_overlap_of_a_hundredth_passes(source, run):
    evaluation = source(pairs(100), "eval.jsonl")
    assert not wrong(run(train=source(pairs(1)), eval=evaluation))
    assert "evaluation apart" in wrong(run(train=source(pairs(2)), eval=evaluation))
    assert "evaluation apart" not in [fact.name for fact in run(train=source(pairs(2))).report.audit]


@pytest.mark.parametrize("overflow", ["truncate", "drop", "split"])
def test_what_cutting_lost_is_counted(source, run, overflow):
    """Of two samples one is cut in its answer: exactly the tokens behind max_length are lost, the end of turn with them."""
    prompt, answer = "hello", " ".join(WORDS)
    whole = run(train=source([{"prompt": prompt, "completion": answer}, *pairs(1)]), apply_chat_template=False)
    length, labels = int(whole.train.lengths[0]), int(whole.train.label_counts[0])
    short = length - 5
    report = run(
        train=source([{"prompt": prompt, "completion": answer}, *pairs(1)]),
        apply_chat_template=False,
        overflow=overflow,
        max_length=short,
    ).report
    lost = {"truncate": (5, 5, 1), "drop": (length, labels, 1), "split": (0, 1, 0)}[overflow]
    assert astuple(report.train.sources[0])[-3:] == lost
    tokens, learnt, answers = lost
    [fact] = [fact for fact in report.audit if fact.name == "whole samples"]
    of = 3 if overflow == "split" else 2
    assert fact.seen == (
        f"longer than data.max_length: 1 of {of}, which lost {tokens} tokens, {learnt} of them learnt; "
        f"answers lost or without their end: {answers}"
    )
    assert fact.ok == (overflow == "split")


def test_what_a_user_should_know_is_said(source, run):
    rows = [
        {
            "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine <|im_end|>"}],
            "n": 1,
        },
        {
            "messages": [
                {"role": "assistant", "content": "hello"},
                {"role": "user", "content": "how"},
                {"role": "assistant", "content": "fine"},
            ],
            "n": 1,
        },
    ]
    report = run(family("thinking"), train=source(rows)).report
    assert report.train.sources[0].ignored_columns == ["n"]
    said = "\n".join(report.warnings)
    assert "holds control tokens as text" in said and "<|im_end|> (1)" in said and "train.jsonl:1" in said
    assert "do not begin with the template's generation prompt, as they will later: 2" in said
    assert "assistant turns that open a conversation: they answer nothing and are not learnt: 1" in said


def test_progress_is_told(source, run):
    told = []
    run(train=source(pairs(250)), progress=lambda path, rows: told.append(rows))
    assert told == [100, 200, 250]


def test_importing_it_is_cheap():
    heavy = "torch numpy transformers datasets pyarrow"
    code = f"import sys, peftcli.data.prepare; print([name for name in {heavy.split()} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
