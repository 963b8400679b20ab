"""Samples of the other tasks: which tokens, which classes, which positions, and what is left when they are cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tasks import words_tokenizer

from data.families import family
from peftcli.data.formats import parse_row
from peftcli.data.labels import Labels
from peftcli.data.task_collate import collate_task
from peftcli.data.task_encoders import ENCODERS, TaskEncoder
from peftcli.data.tokens import TaskSample, TokenDataset
from peftcli.errors import InputError

BERT, T5 = words_tokenizer("bert"), words_tokenizer("t5")


def encoded(task: str, format: str, values: dict[str, Any], tokenizer: Any = BERT) -> tuple[TaskEncoder, TaskSample]:
    encoder = ENCODERS[task](tokenizer)
    (sample,) = encoder.encode(parse_row(format, values, "here", bool(tokenizer.chat_template)), "here")
    return encoder, sample


def words(sample: TaskSample, tokenizer: Any = BERT) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(sample.ids.tolist()))


def test_a_class_is_the_samples_and_special_tokens_survive_a_cut() -> None:
    encoder, sample = encoded("SEQ_CLS", "classification", {"text": "the red cat runs", "label": "x"})
    assert words(sample) == "[CLS] the red cat runs [SEP]" and sample.targets == (0,) and not sample.supervised.any()
    (cut,) = encoder.pieces(sample, 4, split=False)
    assert words(cut) == "[CLS] the red [SEP]"


def test_a_pair_of_texts_has_two_segments() -> None:
    _, sample = encoded("SEQ_CLS", "classification", {"text": "red cat", "text_pair": "blue dog", "label": 1})
    assert words(sample) == "[CLS] red cat [SEP] blue dog [SEP]"
    batch = collate_task(TokenDataset.from_samples([sample]), [0], 0)
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]


def test_a_words_class_is_learnt_at_its_first_token() -> None:
    tokenizer = family("chatml")  # pieces of words
    encoder = ENCODERS["TOKEN_CLS"](tokenizer)
    row = {"tokens": [" think", " zebra", " you"], "tags": ["O", "B-X", -100]}
    row["tags"] = ["O", "B-X", "O"]
    (sample,) = encoder.encode(parse_row("tokens", row, "here", False), "here")
    assert len(sample.ids) > 3 and sample.supervised.sum() == 3
    assert sample.tags[sample.supervised].tolist() == [0, 1, 0]
    batch = collate_task(TokenDataset.from_samples([sample]), [0], 0)
    assert (batch["labels"][0] != -100).sum() == 3


def test_words_without_a_token_are_counted() -> None:
    row = {"tokens": ["red", "", "cat", " "], "tags": ["O", "B-X", "O", "O"]}
    encoder, sample = encoded("TOKEN_CLS", "tokens", row)
    assert sample.supervised.sum() == 2 and encoder.notes.tokenless == 2 and encoder.notes.first["tokenless"] == "here"


QUESTION = {
    "question": "what runs",
    "context": "the red cat runs the blue dog sleeps the green bird eats",
    "answers": {"text": ["blue dog"], "answer_start": [21]},
}


def test_an_answer_is_two_positions() -> None:
    _, sample = encoded("QUESTION_ANS", "qa", QUESTION)
    first, last = sample.targets
    assert words(sample).split()[first : last + 1] == ["blue", "dog"]


def test_a_question_without_an_answer_points_at_the_first_token() -> None:
    _, sample = encoded("QUESTION_ANS", "qa", {**QUESTION, "answers": {"text": [], "answer_start": []}})
    assert sample.targets == (0, 0)


def test_every_answer_that_is_right_is_kept_and_those_a_window_cuts_off_are_none_there() -> None:
    answers = {"text": ["blue dog", "the blue dog", "blue dog", "bird"], "answer_start": [21, 17, 21, 47]}
    encoder, sample = encoded("QUESTION_ANS", "qa", {**QUESTION, "answers": answers})
    spans = list(zip(sample.targets[::2], sample.targets[1::2], strict=True))
    said = words(sample).split()
    assert [said[a : b + 1] for a, b in spans] == [["blue", "dog"], ["the", "blue", "dog"], ["bird"]]
    found = {words(one): one.targets for one in encoder.pieces(sample, 8, split=True)}
    head = "[CLS] what runs [SEP] "
    assert {text.removeprefix(head).removesuffix(" [SEP]"): targets for text, targets in found.items()} == {
        "the red cat": (0, 0),
        "red cat runs": (0, 0),
        "cat runs the": (0, 0),
        "runs the blue": (0, 0),
        "the blue dog": (5, 6, 4, 6),
        "blue dog sleeps": (4, 5),
        "dog sleeps the": (0, 0),
        "sleeps the green": (0, 0),
        "the green bird": (6, 6),
        "green bird eats": (5, 5),
    }
    dataset = TokenDataset.from_samples([sample, sample._replace(targets=(0, 0))])
    assert dataset.targets.tolist() == [list(sample.targets), [0, 0, -100, -100, -100, -100]]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["red", "blue"], "answer_start": [4, 22]}, "holds 'lue ' at character 22"),
        ({"text": ["red", 4], "answer_start": [4, 21]}, "answers.text: must be a string, but is a number"),
        ({"text": ["red", ""], "answer_start": [4, 21]}, "answers.text: is empty"),
        ({"text": ["red", "blue"], "answer_start": [4, True]}, "must be a whole number"),
    ],
)
def test_every_answer_must_stand_where_it_is_said_to(answers: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        encoded("QUESTION_ANS", "qa", {**QUESTION, "answers": answers})


@pytest.mark.parametrize("longest", range(6, 17))
def test_windows_cover_the_context_and_keep_the_answer(longest: int) -> None:
    encoder, sample = encoded("QUESTION_ANS", "qa", QUESTION)
    windows = encoder.pieces(sample, longest, split=True)
    assert all(len(window.ids) <= longest and words(window).startswith("[CLS] what runs [SEP]") for window in windows)
    assert all(words(window).endswith("[SEP]") for window in windows)
    seen = {word for window in windows for word in words(window).split()[4:-1]}
    assert seen == set(QUESTION["context"].split())
    for window in windows:
        first, last = window.targets
        if first:
            assert words(window).split()[first : last + 1] == ["blue", "dog"]
    if longest > 6:  # room for both words at once
        assert any(window.targets[0] for window in windows)


def test_truncation_never_invents_an_unanswerable_question() -> None:
    encoder, sample = encoded("QUESTION_ANS", "qa", QUESTION)
    assert encoder.pieces(sample, 8, split=False) == []
    (kept,) = encoder.pieces(sample, 12, split=False)
    assert words(kept).split()[kept.targets[0] : kept.targets[1] + 1] == ["blue", "dog"]


def test_source_and_target() -> None:
    encoder, sample = encoded("SEQ_2_SEQ_LM", "seq2seq", {"source": "red cat", "target": "the cat is red"}, T5)
    assert words(sample, T5) == "red cat </s> the cat is red </s>" and sample.second == 3
    assert sample.supervised.tolist() == [False] * 3 + [True] * 5
    assert encoder.length(sample) == 5
    batch = collate_task(TokenDataset.from_samples([sample]), [0], 0)
    assert batch["second_labels"][0, :5].tolist() == sample.ids[3:].tolist()
    (cut,) = encoder.pieces(sample, 3, split=False)
    assert words(cut, T5) == "red cat </s> the cat </s>" and cut.second == 3


def test_preferences_share_a_prompt_and_learn_both_answers() -> None:
    tokenizer = family("chatml")
    row = {"prompt": "what", "chosen": "fine", "rejected": "hello world"}
    _, sample = encoded("preference", "preference", row, tokenizer)
    halves = [slice(0, sample.second), slice(sample.second, None)]
    learnt = [tokenizer.decode(sample.ids[half][sample.supervised[half]]) for half in halves]
    assert learnt == ["fine<|im_end|>", "hello world<|im_end|>"]
    given = [sample.ids[half][~sample.supervised[half]] for half in halves]
    assert tokenizer.decode(given[0]) == tokenizer.decode(given[1])


def test_data_sets_keep_their_columns(tmp_path: Any) -> None:
    _, first = encoded("SEQ_CLS", "classification", {"text": "red", "text_pair": "cat", "label": 1})
    _, second = encoded("SEQ_CLS", "classification", {"text": "red blue", "text_pair": "dog", "label": 1})
    dataset = TokenDataset.from_samples([first, second._replace(targets=(7,))])
    dataset.save(tmp_path / "x.safetensors")
    again = TokenDataset.load(tmp_path / "x.safetensors").select([1, 0, 1])
    assert again.targets.tolist() == [[7], [0], [7]] and again.segment.tolist() == [4, 3, 4]
    assert again.units.tolist() == [1, 1, 1]
    assert np.array_equal(again[0][0], second.ids)


class TestLabels:
    def test_order_does_not_depend_on_rows(self) -> None:
        labels = Labels()
        given = [labels.index(name, "label") for name in ("b", "c", "a")]
        names, final = labels.settle()
        assert names == ["a", "b", "c"] and [names[final[index]] for index in given] == ["b", "c", "a"]

    def test_numbers_are_sorted_as_numbers(self) -> None:
        labels = Labels()
        for number in (10, 2, 1):
            labels.index(number, "label")
        assert labels.settle()[0] == ["1", "2", "10"]

    def test_given_names_rule(self) -> None:
        labels = Labels(["no", "yes"])
        assert [labels.index(label, "label") for label in ("yes", 0, 1)] == [1, 0, 1]
        expected = r"no class of model.labels(.|\n)*allowed: no yes(.|\n)*did you mean `yes`"
        with pytest.raises(InputError, match=expected):
            labels.index("yess", "label")
        with pytest.raises(InputError, match="2, which is no class"):
            labels.index(2, "label")

    def test_closed_after_training_data(self) -> None:
        labels = Labels()
        labels.index("a", "label")
        labels.index("b", "label")
        labels.close()
        with pytest.raises(InputError, match="'c', which is no class of the training data"):
            labels.index("c", "label")

    def test_mixed_and_single(self) -> None:
        labels = Labels()
        labels.index("a", "label")
        with pytest.raises(InputError, match="one class only"):
            labels.settle()
        with pytest.raises(InputError, match="some labels are numbers, others words"):
            labels.index(1, "label")
