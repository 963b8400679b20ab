"""A question asked in several windows has one answer, judged once: exact match and F1 by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tasks import words_tokenizer
from torch import Tensor, nn
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from peftcli.data.part import Part
from peftcli.data.task_encoders import ENCODERS
from peftcli.data.task_formats import Question
from peftcli.data.tokens import TokenDataset
from peftcli.errors import InputError
from peftcli.evaluation.bench import Bench
from peftcli.evaluation.compare import compare
from peftcli.evaluation.comparison import Comparison
from peftcli.evaluation.judge import Setting
from peftcli.evaluation.judges import SpanJudge
from peftcli.evaluation.metrics import METRICS
from peftcli.recipe.schema import DataSource

BERT = words_tokenizer("bert")
CONTEXT = "the cat runs the blue dog green bird"
WINDOWS = ["the cat runs the", "runs the blue dog", "blue dog green bird"]
RUNS = BERT.convert_tokens_to_ids("runs")


def asked(context: str, *golds: str) -> Question:
    spans = tuple((context.index(gold), context.index(gold) + len(gold)) for gold in golds)
    return Question("what is", context, spans)


def windows(*questions: Question) -> TokenDataset:
    """Contexts of at most four words, each half over the one before."""
    encoder = ENCODERS["QUESTION_ANS"](BERT)
    samples = []
    for question in questions:
        (sample,) = encoder.encode(question, "here")
        samples += encoder.pieces(sample, 9, split=True) if len(sample.ids) > 9 else [sample]
    return TokenDataset.from_samples(samples)


class Words(nn.Module):
    """Logits that are each word's own; those of no answer depend on whether a window holds `runs`."""

    device = torch.device("cpu")

    def __init__(self, ends_with_bird: float, nothing: tuple[float, float]) -> None:
        super().__init__()
        self.start, self.end = torch.zeros(len(BERT)), torch.zeros(len(BERT))
        for word, start, end in (("runs", 3.0, 0.0), ("blue", 2.0, 3.0), ("bird", 0.0, ends_with_bird)):
            index = BERT.convert_tokens_to_ids(word)
            self.start[index], self.end[index] = start, end
        self.nothing = nothing

    def forward(self, input_ids: Tensor, **_: Any) -> QuestionAnsweringModelOutput:
        start, end = self.start[input_ids], self.end[input_ids]
        start[:, 0] = torch.where((input_ids == RUNS).any(1), *self.nothing)
        return QuestionAnsweringModelOutput(start_logits=start, end_logits=end)


def found(data: TokenDataset, model: Words) -> Comparison:
    judge = SpanJudge(data, Setting(BERT, batch_size=2))
    metrics = {name: METRICS[name] for name in ("loss", "qa_em", "qa_f1")}
    return compare(Bench(model, {}), BERT, data, metrics, judge=judge)


@pytest.mark.parametrize(
    ("bird", "nothing", "said", "em", "f1"),
    [
        # "runs the blue" in the second window scores 3 + 3, "blue dog green bird" in the third 2 + 2. `runs` of the other
        # question is half of its gold answer: F1 is 2 * 1 * 0.5 / 1.5. Articles don't count.
        (2.0, (-9.0, -9.0), ["runs the blue", "runs"], 1 / 2, (1 + 2 / 3) / 2),
        # 2 + 6: of its four words one is among the two of "runs blue": 2 * 1/4 * 1/2 / (3/4).
        (6.0, (-9.0, -9.0), ["blue dog green bird", "runs"], 0, (1 / 3 + 2 / 3) / 2),
        # That there is nothing in the third window, however sure, does not count against the second.
        (2.0, (-9.0, 20.0), ["runs the blue", "runs"], 1 / 2, (1 + 2 / 3) / 2),
        # Nothing in any window scores 5 at least: too little against 6, enough against `runs`, which scores 3.
        (2.0, (5.0, 20.0), ["runs the blue", ""], 1 / 2, 1 / 2),
        (2.0, (7.0, 20.0), ["", ""], 0, 0),
    ],
)
def test_the_best_span_of_all_windows_is_the_answer(
    bird: float, nothing: tuple[float, float], said: list[str], em: float, f1: float, tmp_path: Path
) -> None:
    data = windows(asked(CONTEXT, "runs the blue"), asked("cat runs", "cat runs"))
    data.save(tmp_path / "data.safetensors")
    data = TokenDataset.load(tmp_path / "data.safetensors")
    assert [BERT.decode(data[i][0][4:-1].tolist()) for i in range(4)] == [*WINDOWS, "cat runs"]
    assert data.targets is not None and data.targets.tolist() == [[0, 0], [4, 6], [0, 0], [4, 5]]
    for order, questions in (([0, 1, 2, 3], [0, 1]), ([3, 0, 1, 2], [1, 0])):
        measured = found(data.select(order), Words(bird, nothing))
        assert [item.answers["base"] for item in measured.items] == [said[number] for number in questions]
        rows = {row.metric: row for row in measured.rows}
        assert (rows["qa_em"].base.value, rows["qa_f1"].base.value) == (pytest.approx(em), pytest.approx(f1))
        assert [row.count for row in measured.rows] == [4, 2, 2]


def test_gold_answers_are_those_of_the_whole_context() -> None:
    """Five words are in no window of four; without them the question would have no answer, and `nothing` be right."""
    data = windows(asked(CONTEXT, "cat runs the blue dog"), asked(CONTEXT, "cat", "bird"), asked(CONTEXT))
    measured = found(data, Words(2.0, (7.0, 7.0)))
    assert [item.expected for item in measured.items] == [["cat runs the blue dog"], ["cat", "bird"], [""]]
    assert {item.question for item in measured.items} == {f"what is {CONTEXT}"}
    assert [item.answers["base"] for item in measured.items] == [""] * 3
    assert measured.rows[1].base.value == measured.rows[2].base.value == pytest.approx(1 / 3)


def test_weights_take_whole_questions() -> None:
    """2.5 times three questions: each twice, and two (half of three, rounded) once more; all with all their windows."""
    part = Part("eval", [DataSource(path="x", weight=2.5)])
    part.dataset = windows(asked(CONTEXT, "cat"), asked("cat runs", "cat"), asked(CONTEXT, "bird"))
    part.source_of = [0] * len(part.dataset)
    part.repeat_by_weight(np.random.default_rng(0))
    questions = part.dataset.questions
    judge = SpanJudge(part.dataset, Setting(BERT))
    asked_for = [(judge.question(index), len(samples)) for samples in questions for index in samples[:1]]
    assert len(asked_for) == 8 and set(asked_for) == {(f"what is {CONTEXT}", 3), ("what is cat runs", 1)}
    assert sorted(index for samples in questions for index in samples) == list(range(len(part.dataset)))
    part.source_of, part.weights = [0] * len(part.dataset), [0.01]
    with pytest.raises(InputError, match="leave no sample"):
        part.repeat_by_weight(np.random.default_rng(0))
