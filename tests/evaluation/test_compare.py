"""Base against adapter, on tiny models: what is asked, what is written, what is counted."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data.families import family
from torch import nn
from training.tiny import tiny_llama

from peftcli import LoraConfig, get_peft_model
from peftcli.data.encoder import Encoder
from peftcli.data.formats import Completion, Conversation
from peftcli.data.tokens import TokenDataset
from peftcli.errors import InputError
from peftcli.evaluation.answers import answers, end_tokens
from peftcli.evaluation.compare import compare, score_tokens
from peftcli.evaluation.generate import generate

TURNS = [("user", "how are you"), ("assistant", "fine thanks"), ("user", "the question"), ("assistant", "4")]


def chat(turns: list[tuple[str, str]]) -> Conversation:
    messages = [{"role": role, "content": content} for role, content in turns]
    return Conversation(messages, [role == "assistant" for role, _ in turns])


def encoded(tokenizer, *examples, loss_on: str = "assistant") -> TokenDataset:
    encoder = Encoder(tokenizer, loss_on)
    return TokenDataset.from_samples(sample for example in examples for sample in encoder.encode(example, "test:1"))


def adapted(tokenizer, seed: int = 0) -> nn.Module:
    """A tiny model with an adapter that changes what it writes."""
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


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


def test_running_text_has_no_answers() -> None:
    tokenizer = family("llama3")
    data = encoded(tokenizer, chat(TURNS), loss_on="all")
    assert answers(data) == []
    with pytest.raises(InputError, match="nothing to answer"):
        compare(adapted(tokenizer), tokenizer, data, ["exact_match"])


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
    assert generate(model, prompts, **settings) == expected


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
    scores = score_tokens(model, data, 0)
    for index in range(len(data)):
        ids, supervised = (torch.from_numpy(column.copy()) for column in data[index])
        with torch.no_grad():
            logits = model(input_ids=ids[None].long(), use_cache=False).logits[0]
        expected = nn.functional.cross_entropy(
            logits[:-1][supervised[1:]], ids[1:][supervised[1:]].long(), reduction="sum"
        )
        assert scores.losses[index] == pytest.approx(float(expected), rel=1e-5)
    assert scores.counts.tolist() == [int(data[index][1].sum()) for index in range(len(data))]


def test_the_base_side_is_the_base() -> None:
    tokenizer = family("chatml")
    data = encoded(tokenizer, chat(TURNS), chat(TURNS[:2]), Completion("the question: ", "4"))
    model = adapted(tokenizer)
    found = compare(model, tokenizer, data, ["loss", "exact_match", "loss"])
    assert [row.metric for row in found.rows] == ["loss", "exact_match"]
    assert [row.count for row in found.rows] == [3, 4]
    with model.disable_adapter():
        alone = score_tokens(model, data, 0)
    assert found.rows[0].base.value == pytest.approx(alone.losses.sum() / alone.counts.sum())
    assert found.rows[0].delta.value == pytest.approx(found.rows[0].tuned.value - found.rows[0].base.value)
    assert found.rows[0].delta.value != 0
    assert json.dumps(found.to_dict())


def test_lost_items_are_those_only_the_base_has_right() -> None:
    """What the base writes is made the expected answer, so the base has everything right."""
    tokenizer = family("chatml")
    model = adapted(tokenizer)
    asked = encoded(tokenizer, chat(TURNS[:2]), chat([("user", "what"), ("assistant", "4")]))
    first = compare(model, tokenizer, asked, [], generated=True, max_new_tokens=4)
    samples = []
    for answer, item in zip(answers(asked), first.items, strict=True):
        ids = tokenizer(item.base, add_special_tokens=False).input_ids
        samples.append(
            (
                np.append(answer.prompt, ids).astype(np.int32),
                np.arange(len(answer.prompt) + len(ids)) >= len(answer.prompt),
            )
        )
    found = compare(model, tokenizer, TokenDataset.from_samples(samples), ["exact_match"], max_new_tokens=4)
    assert found.rows[0].base.value == 1.0
    wrong = [item for item in found.items if item.tuned.strip() != item.base.strip()]
    assert wrong and found.lost == wrong
    assert found.missed({"exact_match": 1.0}) and not found.missed({"exact_match": 0.0})


def test_a_tokenizer_without_end_token_still_stops_at_the_turns_end() -> None:
    tokenizer = SimpleNamespace(eos_token_id=None, added_tokens_decoder={3: SimpleNamespace(special=True)})
    data = TokenDataset.from_samples([(np.array([1, 2, 7, 3], np.int32), np.array([False, False, True, True]))])
    assert end_tokens(answers(data), tokenizer) == [3]
