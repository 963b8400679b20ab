"""Base against adapter, on tiny models: what is asked, what is written, what is counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data.families import family
from torch import nn
from training.tiny import tiny_llama

from peftcli import IA3Config, LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from peftcli.data.encoder import Encoder
from peftcli.data.formats import Completion, Conversation
from peftcli.data.tokens import TokenDataset
from peftcli.errors import InputError
from peftcli.evaluation.answers import answers, end_tokens
from peftcli.evaluation.bench import Bench
from peftcli.evaluation.compare import compare
from peftcli.evaluation.comparison import Comparison
from peftcli.evaluation.generate import generate
from peftcli.evaluation.metrics import METRICS, known_metrics
from peftcli.evaluation.score import score_tokens

TURNS = [("user", "how are you"), ("assistant", "fine thanks"), ("user", "the question"), ("assistant", "4")]


def chat(turns: list[tuple[str, str]]) -> Conversation:
    messages = [{"role": role, "content": content} for role, content in turns]
    return Conversation(messages, [role == "assistant" for role, _ in turns])


def encoded(tokenizer, *examples, loss_on: str = "assistant") -> TokenDataset:
    encoder = Encoder(tokenizer, loss_on)
    return TokenDataset.from_samples(sample for example in examples for sample in encoder.encode(example, "test:1"))


def base_model(tokenizer) -> nn.Module:
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    return model.eval()


def adapted(tokenizer, seed: int = 0, config: PeftConfig | None = None) -> nn.Module:
    """A tiny model with an adapter that changes what it writes."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base_model(tokenizer), config or lora).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def bench_of(tokenizer, folder: Path, *models: nn.Module) -> Bench:
    """The base with saved adapters: `tuned`, or `a`, `b`, ... of several."""
    names = ["tuned"] if len(models) == 1 else "abcdef"[: len(models)]
    for name, model in zip(names, models, strict=True):
        model.save_pretrained(folder / name)
    return Bench(base_model(tokenizer), {name: folder / name for name in names})


def measured(bench: Bench, tokenizer, data: TokenDataset, names: Sequence[str], **options) -> Comparison:
    return compare(bench, tokenizer, data, {name: METRICS[name] for name in names}, **options)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral", "phi"])
def test_a_prompt_is_what_the_template_gives_at_inference(name: str) -> None:
    tokenizer = family(name)
    found = answers(encoded(tokenizer, chat(TURNS)))
    assert [tokenizer.decode(answer.expected, skip_special_tokens=True).strip() for answer in found] == [
        "fine thanks",
        "4",
    ]
    for answer, turns in zip(found, (1, 3), strict=True):
        given = tokenizer.apply_chat_template(
            chat(TURNS).messages[:turns], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert answer.prompt.tolist() == given


def test_only_the_turn_that_is_learnt_is_asked() -> None:
    tokenizer = family("chatml")
    [answer] = answers(encoded(tokenizer, chat(TURNS), loss_on="last_assistant"))
    assert tokenizer.decode(answer.expected) == "4<|im_end|>"


def test_running_text_has_no_answers(tmp_path: Path) -> None:
    tokenizer = family("llama3")
    data = encoded(tokenizer, chat(TURNS), loss_on="all")
    assert answers(data) == []
    with pytest.raises(InputError, match="nothing to answer"):
        measured(bench_of(tokenizer, tmp_path, adapted(tokenizer)), tokenizer, data, ["exact_match"])


def test_generation_ends_where_answers_end() -> None:
    for name in ("chatml", "gemma", "phi"):
        tokenizer = family(name)
        ends = tokenizer.convert_ids_to_tokens(end_tokens(answers(encoded(tokenizer, chat(TURNS))), tokenizer))
        turn = {"chatml": "<|im_end|>", "gemma": "<end_of_turn>", "phi": "<|end|>"}[name]
        assert set(ends) == {turn, tokenizer.eos_token}


def greedy(model, prompt: np.ndarray, ends: list[int], steps: int) -> list[int]:
    """One token at a time, without batch, padding or cache."""
    ids = prompt.tolist()
    for _ in range(steps):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_batched_generation_is_that_of_single_prompts(batch_size: int) -> None:
    tokenizer = family("chatml")
    model = adapted(tokenizer)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, len(tokenizer), length).astype(np.int32) for length in (3, 9, 5, 4, 9)]
    with torch.no_grad():
        plain = [greedy(model, prompt, [], 6) for prompt in prompts]
        ends = [plain[0][2], plain[3][4]]  # tokens that really come, so that some rows end early
        expected = [greedy(model, prompt, ends, 6) for prompt in prompts]
    assert len({len(tokens) for tokens in expected}) > 1
    settings = {"end_tokens": ends, "pad_token_id": 0, "max_new_tokens": 6, "batch_size": batch_size}
    [written] = generate(model, prompts, **settings)
    assert [answer.tokens for answer in written] == expected
    assert [answer.stopped for answer in written] == [len(tokens) < 6 for tokens in expected]


def test_a_bases_own_generation_settings_do_not_count() -> None:
    tokenizer = family("chatml")
    model = adapted(tokenizer)
    settings = {"end_tokens": [], "pad_token_id": 0, "max_new_tokens": 6, "batch_size": 2}
    prompts = [np.array([5, 6, 7], np.int32)]
    before = generate(model, prompts, **settings)
    vars(model.get_base_model().generation_config).update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    assert generate(model, prompts, **settings) == before


def test_scores_are_the_models_own_losses() -> None:
    tokenizer = family("chatml")
    data = encoded(tokenizer, chat(TURNS), chat(TURNS[:2]))
    model = adapted(tokenizer)
    [scores] = score_tokens(model, data, 0)
    for index in range(len(data)):
        ids, supervised = (torch.from_numpy(column.copy()) for column in data[index])
        with torch.no_grad():
            logits = model(input_ids=ids[None].long(), use_cache=False).logits[0]
        expected = nn.functional.cross_entropy(
            logits[:-1][supervised[1:]], ids[1:][supervised[1:]].long(), reduction="sum"
        )
        assert scores.losses[index] == pytest.approx(float(expected), rel=1e-5)
        assert scores.correct[index] == int((logits[:-1].argmax(-1) == ids[1:])[supervised[1:]].sum())
    assert scores.counts.tolist() == [int(data[index][1].sum()) for index in range(len(data))]


def test_the_base_side_is_the_base(tmp_path: Path) -> None:
    tokenizer = family("chatml")
    data = encoded(tokenizer, chat(TURNS), chat(TURNS[:2]), Completion("the question: ", "4"))
    found = measured(bench_of(tokenizer, tmp_path, adapted(tokenizer)), tokenizer, data, ["loss", "exact_match"])
    assert [row.metric for row in found.rows] == ["loss", "exact_match"]
    assert [row.count for row in found.rows] == [3, 4]
    [alone] = score_tokens(base_model(tokenizer), data, 0)
    row = found.rows[0]
    assert row.base.value == pytest.approx(alone.losses.sum() / alone.counts.sum())
    assert row.delta("tuned").value == pytest.approx(row.adapters["tuned"].value - row.base.value)
    assert row.delta("tuned").value != 0
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_lost_items_are_those_only_the_base_has_right(tmp_path: Path) -> None:
    """What the base writes is made the expected answer, so the base has everything right."""
    tokenizer = family("chatml")
    bench = bench_of(tokenizer, tmp_path, adapted(tokenizer))
    asked = encoded(tokenizer, chat(TURNS[:2]), chat([("user", "what"), ("assistant", "4")]))
    first = measured(bench, tokenizer, asked, [], generated=True, max_new_tokens=4)
    samples = []
    for answer, item in zip(answers(asked), first.items, strict=True):
        ids = tokenizer(item.answers["base"], add_special_tokens=False).input_ids
        samples.append(
            (
                np.append(answer.prompt, ids).astype(np.int32),
                np.arange(len(answer.prompt) + len(ids)) >= len(answer.prompt),
            )
        )
    data = TokenDataset.from_samples(samples)
    found = measured(bench, tokenizer, data, ["exact_match", "accuracy", "macro_f1"], max_new_tokens=4)
    assert [row.base.value for row in found.rows] == [1.0, 1.0, 1.0]
    wrong = [item for item in found.items if item.answers["tuned"].strip() != item.answers["base"].strip()]
    assert wrong and found.lost("tuned") == wrong and not found.gained("tuned")
    test = found.rows[0].test("tuned")
    assert (test.gained, test.lost) == (0, len(wrong))
    assert found.missed({"exact_match": 1.0}) and not found.missed({"exact_match": 0.0})


EVERYTHING = [name for name, metric in METRICS.items() if not metric.of_spans]


def test_mixed_rows_give_what_each_adapter_gives_alone(tmp_path: Path) -> None:
    """LoRA on every linear layer, one that trains the head too, and IA3: one batch of all, against one run each."""
    tokenizer = family("chatml")
    prompts = [chat([("user", f"question {'the ' * number}"), ("assistant", "fine thanks")]) for number in range(5)]
    data = encoded(tokenizer, *prompts, chat(TURNS))
    models = [
        adapted(tokenizer, 1),
        adapted(tokenizer, 2, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])),
        adapted(tokenizer, 3, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    ]
    together = bench_of(tokenizer, tmp_path, *models)
    assert together.alone == {} and together.columns == ("base", "a", "b", "c")
    assert [turn.columns for turn in together.turns()] == [("base", "a", "b", "c")]
    mixed = measured(together, tokenizer, data, EVERYTHING, max_new_tokens=6, batch_size=8)
    losses = set()
    for column in ("a", "b", "c"):
        alone = Bench(base_model(tokenizer), {column: tmp_path / column})
        single = measured(alone, tokenizer, data, EVERYTHING, max_new_tokens=6, batch_size=3)
        for ours, theirs in zip(mixed.rows, single.rows, strict=True):
            assert ours.base.value == pytest.approx(theirs.base.value, rel=1e-5)
            assert ours.adapters[column].value == pytest.approx(theirs.adapters[column].value, rel=1e-5), ours.metric
            np.testing.assert_allclose(
                ours.adapters[column].influence, theirs.adapters[column].influence, rtol=1e-4, atol=1e-7
            )
        assert [item.answers[column] for item in mixed.items] == [item.answers[column] for item in single.items]
        losses.add(round(single.rows[0].adapters[column].value, 4))
    assert len(losses) == 3, "the adapters differ"
    assert {turn.columns for turn in together.turns()} == {("base", "a", "b", "c")}, "the bench can be used again"


def test_what_can_not_be_mixed_is_switched(tmp_path: Path) -> None:
    """Prompts and trained biases look at the whole batch: each goes alone, on the same base, and that is said."""
    tokenizer = family("chatml")
    data = encoded(tokenizer, chat(TURNS), chat(TURNS[:2]))
    models = [
        adapted(tokenizer, 1, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
        adapted(tokenizer, 2),
        adapted(tokenizer, 3, LoraConfig(r=2, target_modules="all-linear", layer_replication=[[0, 2], [1, 2]])),
    ]
    bench = bench_of(tokenizer, tmp_path, *models)
    before = {name: tensor.clone() for name, tensor in bench.base.state_dict().items()}
    assert [turn.columns for turn in bench.turns()] == [("base", "b"), ("a",), ("c",)]
    found = measured(bench, tokenizer, data, ["loss", "exact_match"], max_new_tokens=3)
    assert [note.split(" ")[0] for note in found.notes] == ["a", "c"]
    for column, model in zip("abc", models, strict=True):
        [own] = score_tokens(model, data, 0)
        value = found.rows[0].adapters[column].value
        assert value == pytest.approx(own.losses.sum() / own.counts.sum(), rel=1e-5)
    [bare] = score_tokens(base_model(tokenizer), data, 0)
    assert found.rows[0].base.value == pytest.approx(bare.losses.sum() / bare.counts.sum(), rel=1e-6)
    after = bench.base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_each_metric_of_answers_comes_from_what_was_written(tmp_path: Path) -> None:
    tokenizer = family("chatml")
    data = encoded(tokenizer, chat(TURNS), chat(TURNS[:2]))
    known = known_metrics(r"\d")
    metrics = {name: known[name] for name in ("regex", "rouge_l", "stop_rate", "repetition", "qa_f1")}
    found = compare(bench_of(tokenizer, tmp_path, adapted(tokenizer)), tokenizer, data, metrics, max_new_tokens=9)
    for row in found.rows:
        for column, estimate in (("base", row.base), ("tuned", row.adapters["tuned"])):
            own = [{**item.scores[column], **item.writing[column]}[row.metric] for item in found.items]
            assert estimate.value == pytest.approx(sum(own) / len(own))
    for item in found.items:
        written = item.answers["tuned"]
        assert item.scores["tuned"]["regex"] == float(any(character.isdigit() for character in written))


def test_token_labels_are_no_language_models(tmp_path: Path) -> None:
    tokenizer = family("chatml")
    with pytest.raises(InputError, match="span_f1: is a metric of token labels"):
        measured(
            bench_of(tokenizer, tmp_path, adapted(tokenizer)), tokenizer, encoded(tokenizer, chat(TURNS)), ["span_f1"]
        )


def test_a_tokenizer_without_end_token_still_stops_at_the_turns_end() -> None:
    tokenizer = SimpleNamespace(eos_token_id=None, added_tokens_decoder={3: SimpleNamespace(special=True)})
    data = TokenDataset.from_samples([(np.array([1, 2, 7, 3], np.int32), np.array([False, False, True, True]))])
    assert end_tokens(answers(data), tokenizer) == [3]
