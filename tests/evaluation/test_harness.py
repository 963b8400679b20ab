"""lm-evaluation-harness: JSONL files as its tasks, our model in its hands. What needs the harness itself is slow, and
skipped where the extra `eval` is not installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from data.families import family
from torch import nn
from training.tiny import tiny_llama

from peftcli import LoraConfig, PeftModel, get_peft_model
from peftcli.cli import main
from peftcli.data.encoder import Encoder
from peftcli.data.formats import Completion
from peftcli.data.tokens import TokenDataset
from peftcli.errors import InputError
from peftcli.evaluation.bench import Bench
from peftcli.evaluation.compare import compare
from peftcli.evaluation.harness import _jsonl_task, compare_tasks, load_tasks
from peftcli.evaluation.metrics import METRICS

HARNESS = find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HARNESS, reason="lm_eval is not installed (pip install 'peftcli[eval]')")
ASKED = [("what 1", "fine thanks"), ("what 2", "the answer is 4"), ("the question is", "tool"), ("hello", "world 1")]
CHOICES = [
    {"prompt": "what 1", "choices": [" fine", " tool", " world"], "answer": 0},
    {"prompt": "what 2", "choices": [" fine", " tool"], "answer": " tool"},
    {"prompt": "the question", "choices": [" answer", " hello"], "answer": 1},
]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.skipif(HARNESS, reason="the extra is installed")
def test_without_the_harness_the_way_to_get_it_is_named(tmp_path: Path, capsys) -> None:
    assert main(["eval", str(tmp_path), "--tasks", "arc_easy"]) == 2
    assert "pip install 'peftcli[eval]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "is no task"),
        ({"prompt": "a", "completion": 1}, "completion: is not a text"),
        ({"prompt": "a", "choices": ["b"], "answer": 0}, "choices: is not a list of two texts"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": "d"}, "answer: is none of the choices"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 2}, "answer: is none of the choices"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": True}, "answer: is none of the choices"),
    ],
)
def test_rows_that_are_no_task_are_named(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        _jsonl_task(write(tmp_path / "task.jsonl", [row]), family("chatml"))
    assert "task.jsonl:1" in str(refused.value)


def bench_with_own_head(tokenizer, folder: Path) -> Bench:
    """A base whose head is its embedding, and an adapter that trained a head of its own."""

    def base() -> nn.Module:
        model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True)
        model.config.pad_token_id = model.generation_config.pad_token_id = None
        return model.eval()

    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = get_peft_model(base(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder / "own-head")
    return Bench(base(), {"tuned": folder / "own-head"})


def encoded(tokenizer, asked: list[tuple[str, str]]) -> TokenDataset:
    encoder = Encoder(tokenizer, "completion")
    return TokenDataset.from_samples(s for pair in asked for s in encoder.encode(Completion(*pair), "test"))


def right_for_some(bench: Bench, tokenizer) -> list[tuple[str, str]]:
    """Questions of which the first half expects what the base writes, the second what the adapter does."""
    written = compare(bench, tokenizer, encoded(tokenizer, ASKED), {}, generated=True, max_new_tokens=3).items
    sides = ("base", "base", "tuned", "tuned")
    return [(prompt, item.answers[side]) for (prompt, _), item, side in zip(ASKED, written, sides, strict=True)]


@needs_harness
@pytest.mark.slow
def test_the_harness_agrees_with_our_own_evaluation(tmp_path: Path) -> None:
    tokenizer = family("chatml")
    bench = bench_with_own_head(tokenizer, tmp_path)
    asked = right_for_some(bench, tokenizer)
    file = write(tmp_path / "mine.jsonl", [{"prompt": prompt, "completion": text} for prompt, text in asked])
    rows = compare_tasks(bench, tokenizer, load_tasks([str(file)], tokenizer), batch_size=2)
    names = ("exact_match", "contains", "rouge_l")
    ours = compare(bench, tokenizer, encoded(tokenizer, asked), {name: METRICS[name] for name in names})
    assert [row.metric for row in rows] == [f"mine:{name}" for name in names]
    for theirs, own in zip(rows, ours.rows, strict=True):
        assert theirs.count == len(ASKED)
        assert theirs.base.value == pytest.approx(own.base.value)
        assert theirs.adapters["tuned"].value == pytest.approx(own.adapters["tuned"].value)
        assert theirs.test("tuned") == own.test("tuned")
    assert 0 < rows[1].adapters["tuned"].value < 1 and 0 < rows[1].base.value < 1  # contains: nothing stops early


@needs_harness
@pytest.mark.slow
def test_choices_are_ranked_by_likelihood_and_a_trained_head_stays(tmp_path: Path) -> None:
    tokenizer = family("chatml")
    bench = bench_with_own_head(tokenizer, tmp_path)
    tasks = load_tasks([str(write(tmp_path / "choice.jsonl", CHOICES))], tokenizer)
    row = next(row for row in compare_tasks(bench, tokenizer, tasks) if row.metric == "choice:acc")
    tuned = PeftModel.from_pretrained(bench.base, tmp_path / "own-head")
    assert row.adapters["tuned"].value == pytest.approx(by_hand(tuned, tokenizer))
    with tuned.disable_adapter():
        assert row.base.value == pytest.approx(by_hand(tuned, tokenizer))
    assert "tie_weights" not in vars(bench.base)


def by_hand(model: nn.Module, tokenizer) -> float:
    right = 0
    for row in CHOICES:
        start = len(tokenizer(row["prompt"]).input_ids)
        likelihoods = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(row["prompt"] + choice).input_ids])
            with torch.no_grad():
                scores = model(input_ids=ids).logits.log_softmax(-1)[0, start - 1 : -1]
            likelihoods.append(float(scores.gather(1, ids[0, start:, None]).sum()))
        answer = row["answer"] if isinstance(row["answer"], int) else row["choices"].index(row["answer"])
        right += likelihoods.index(max(likelihoods)) == answer
    return right / len(CHOICES)


@needs_harness
@pytest.mark.slow
def test_a_task_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="did you mean `arc_easy`"):
        load_tasks(["arc_eazy"], family("chatml"))
