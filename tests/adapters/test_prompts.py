"""The table of the prompt methods: every method on every task, judged by the bare model with real words in front."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from prompts import BASES, LANGUAGE_MODELS, ROWS, TOKENS, WORDS, Base, Row, write_cache, write_words
from safetensors.torch import load_file
from torch import Tensor

from peftcli import (
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peftcli.adapters import kv_cache
from peftcli.errors import InputError
from peftcli.recipe.adapter_section import AdapterSection
from peftcli.recipe.schema import Recipe

PLAIN = [ROWS[0], ROWS[2]]
"""Methods whose prompt can be written down, one with and one without tasks."""

table = pytest.mark.parametrize(
    ("row", "base"), [pytest.param(row, base, id=f"{row}-{base}") for row in ROWS if row != ROWS[1] for base in BASES]
)
words_in_front = pytest.mark.parametrize(
    ("row", "base"), [pytest.param(row, base, id=f"{row}-{base}") for row in PLAIN for base in BASES]
)


def adapted(row: Row, base: Base) -> tuple[PeftModel, Any, dict[str, Tensor]]:
    """A model with a prompt, the bare one, and inputs for both."""
    bare = base.model()
    inputs = base.inputs() | row.tasks(0, 2)
    return row.adapt(copy.deepcopy(bare), base.task), bare, inputs


def without_tasks(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name != "task_ids"}


def say(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Everything a model says: logits, or hidden states."""
    said = model(**inputs)
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return [said[name] for name in names if name in said]


outputs = torch.no_grad()(say)
"""The same without gradients. (With them, torch picks other kernels for a frozen model than for one that is not.)"""


def assert_equal(ours: list[Tensor], theirs: list[Tensor], *, exact: bool = True) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=0 if exact else 1e-5, rtol=0 if exact else 1e-4)


def in_front(base: Base, inputs: dict[str, Tensor], row: Row) -> dict[str, Tensor]:
    """The inputs with the real words of the prompt in front, as the bare model gets them."""
    words = WORDS.expand(2, -1)
    longer = without_tasks(inputs)
    longer["input_ids"] = torch.cat([words, inputs["input_ids"]], 1)
    longer["attention_mask"] = torch.cat([torch.ones_like(words), inputs["attention_mask"]], 1)
    if base.is_encoder_decoder and row.is_multitask:
        longer["decoder_input_ids"] = torch.cat([words, inputs["decoder_input_ids"]], 1)
    return longer


def real(base: Base, inputs: dict[str, Tensor], row: Row, said: list[Tensor]) -> list[Tensor]:
    """What was said about tokens that are no padding: whatever a model says about padding is noise."""
    if base.is_encoder_decoder or base.task == "SEQ_CLS":
        return said
    mask = torch.cat([torch.ones(2, TOKENS), inputs["attention_mask"]], 1).bool()
    return [tensor[mask] for tensor in said]


def checkpoint_activations(model: Any, reentrant: bool = False) -> None:
    """Later versions of transformers 5 know it by the first name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


# -- what the prompt does -------------------------------------------------------------------------------------------


@words_in_front
def test_a_prompt_of_real_words_is_the_bare_model_with_these_words(row: Row, base: Base) -> None:
    """Masks, positions, token types: whatever follows the text is right, or this differs."""
    model, bare, inputs = adapted(row, base)
    bare.load_state_dict(
        {name: model.get_base_model().state_dict().get(name, t) for name, t in bare.state_dict().items()}
    )
    write_words(model)
    expected = outputs(bare, in_front(base, inputs, row))
    assert_equal(real(base, inputs, row, outputs(model, inputs)), real(base, inputs, row, expected), exact=False)


@words_in_front
def test_labels_follow_the_text(row: Row, base: Base) -> None:
    model, bare, inputs = adapted(row, base)
    write_words(model)
    labels = base.labels(inputs["decoder_input_ids" if base.is_encoder_decoder else "input_ids"])
    if not labels:
        pytest.skip("nothing is learnt from the text")
    longer = in_front(base, inputs, row)
    shifted = dict(labels)
    if base.task in ("CAUSAL_LM", "TOKEN_CLS") or (base.is_encoder_decoder and row.is_multitask):
        shifted["labels"] = torch.cat([torch.full((2, TOKENS), -100), labels["labels"]], 1)
    if base.task == "QUESTION_ANS":
        shifted = {name: position + TOKENS for name, position in labels.items()}
    loss = model(**inputs, **labels).loss
    torch.testing.assert_close(loss, bare(**longer, **shifted).loss, atol=1e-5, rtol=1e-5)


def test_the_decoder_s_prompt_stands_in_front_of_shifted_labels() -> None:
    model, _, inputs = adapted(ROWS[2], BASES[2])
    ids = inputs.pop("decoder_input_ids")
    labels = torch.cat([ids[:, 1:], ids[:, :1] + 1], 1)
    given = model(**inputs, decoder_input_ids=ids).logits
    assert_equal([model(**inputs, labels=labels).logits], [given])


@pytest.mark.parametrize("base", LANGUAGE_MODELS, ids=str)
def test_a_prefix_of_real_words_is_the_bare_model_with_these_words(base: Base) -> None:
    row = ROWS[5]
    model, bare, inputs = adapted(row, base)
    write_cache(model, bare)
    kept = inputs["attention_mask"].bool()
    expected = bare(**in_front(base, inputs, row)).logits[:, TOKENS:]
    assert_equal([model(**inputs).logits[kept]], [expected[kept]], exact=False)


@table
def test_switched_off_is_the_base(row: Row, base: Base) -> None:
    bare, inputs = base.model(), base.inputs() | row.tasks(0, 2)
    expected = outputs(bare, base.inputs())
    model = row.adapt(bare, base.task)
    before = outputs(model, inputs)
    assert not torch.equal(before[0][:1, -1], expected[0][:1, -1])
    with model.disable_adapter():
        assert_equal(outputs(model, inputs), expected)
        with model.disable_adapter():
            assert_equal(outputs(model, inputs), expected)
        assert_equal(outputs(model, inputs), expected)
    assert_equal(outputs(model, inputs), before)


@table
def test_every_parameter_gets_a_gradient(row: Row, base: Base) -> None:
    model, _, inputs = adapted(row, base)
    sum((tensor**2).sum() for tensor in say(model, inputs)).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith("prompt_encoder.default.") for name in trained)
    dead = [name for name, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_heads_are_trained_in_full_and_stored_with_one_prefix() -> None:
    model, _, _ = adapted(ROWS[0], BASES[5])
    heads = {name for name, p in model.named_parameters() if p.requires_grad} - {
        "prompt_encoder.default.embedding.weight"
    }
    assert heads == {f"base_model.classifier.modules_to_save.default.{leaf}" for leaf in ("weight", "bias")}
    assert set(get_peft_model_state_dict(model)) == {
        *("prompt_embeddings", "base_model.classifier.weight", "base_model.classifier.bias"),
    }


def test_tasks_of_a_batch_are_told_apart() -> None:
    model, _, inputs = adapted(ROWS[2], BASES[0])
    plain = without_tasks(inputs)
    singles = [model(**plain, task_ids=torch.tensor([task, task])).logits for task in range(3)]
    mixed = model(**plain, task_ids=torch.tensor([2, 0])).logits
    assert_equal([mixed], [torch.stack([singles[2][0], singles[0][1]])], exact=False)
    assert not torch.allclose(singles[0], singles[1])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("row", [row for row in ROWS if not row.stands_in_cache], ids=str)
def test_gradients_survive_checkpointing(row: Row, reentrant: bool) -> None:
    model, _, inputs = adapted(row, BASES[0])

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model.train()(**inputs, use_cache=False).logits.pow(2).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    checkpoint_activations(model.get_base_model(), reentrant)
    assert_equal(gradients(), plain, exact=False)


def test_a_prefix_and_checkpointing_are_refused_whichever_comes_first() -> None:
    words = "PREFIX_TUNING does not work with gradient checkpointing"
    model, bare, inputs = adapted(ROWS[5], BASES[0])
    checkpoint_activations(model.get_base_model())
    with pytest.raises(ValueError, match=words):
        model.train()(**inputs)
    checkpoint_activations(bare)
    with pytest.raises(ValueError, match=words):
        ROWS[5].adapt(bare, "CAUSAL_LM")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("row", "base"), [(ROWS[2], BASES[0]), (ROWS[3], BASES[5]), (ROWS[5], BASES[2])], ids=str)
def test_compiles_in_one_graph(row: Row, base: Base) -> None:
    """But for an LSTM, which torch.compile leaves to a graph of its own."""
    torch._dynamo.reset()
    model, _, inputs = adapted(row, base)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_equal([compiled(**inputs).logits], [model(**inputs).logits], exact=False)


# -- generation -----------------------------------------------------------------------------------------------------

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("base", LANGUAGE_MODELS, ids=str)
@pytest.mark.parametrize("row", [ROWS[0], ROWS[2], ROWS[4], ROWS[5], ROWS[6]], ids=str)
def test_generation_equals_one_argmax_after_the_other(row: Row, base: Base) -> None:
    model, _, inputs = adapted(row, base)
    ids, tasks = inputs["input_ids"][:1], row.tasks(2)
    expected = ids
    for _ in range(GREEDY["max_new_tokens"]):
        expected = torch.cat([expected, model(input_ids=expected, **tasks).logits[:, -1:].argmax(-1)], 1)
    for use_cache in (True, False):
        assert torch.equal(model.generate(input_ids=ids, use_cache=use_cache, **tasks, **GREEDY), expected)


@pytest.mark.parametrize("base", [base for base in LANGUAGE_MODELS if base.name != "mistral"], ids=str)
@pytest.mark.parametrize("row", [ROWS[0], ROWS[2], ROWS[5]], ids=str)
def test_padded_rows_are_generated_as_if_alone(row: Row, base: Base) -> None:
    """But for sliding windows, which count the padding between prompt and text."""
    model, _, _ = adapted(row, base)
    ids, mask = torch.tensor([[5, 8, 13, 21], [0, 0, 6, 7]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    both = model.generate(input_ids=ids, attention_mask=mask, **row.tasks(1, 2), **GREEDY)
    assert torch.equal(both[:1], model.generate(ids[:1], **row.tasks(1), **GREEDY))
    assert torch.equal(both[1:, 2:], model.generate(ids[1:, 2:], **row.tasks(2), **GREEDY))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("base", [BASES[0], BASES[1]], ids=str)
@pytest.mark.parametrize("row", [ROWS[0], ROWS[2], ROWS[5]], ids=str)
def test_beams_behind_real_words_are_the_bare_model_s(row: Row, base: Base, beams: int) -> None:
    model, bare, inputs = adapted(row, base)
    write_cache(model, bare) if row.stands_in_cache else write_words(model)
    ids = inputs["input_ids"][:, :2]
    longer = torch.cat([WORDS.expand(2, -1), ids], 1)
    options = {**GREEDY, "num_beams": beams, "num_return_sequences": beams}
    ours = model.generate(input_ids=ids, **row.tasks(0, 2), **options)
    assert torch.equal(ours[:, 2:], bare.generate(longer, **options)[:, TOKENS + 2 :])


@pytest.mark.parametrize("base", [BASES[2], BASES[3]], ids=str)
@pytest.mark.parametrize("row", [ROWS[0], ROWS[2], ROWS[3], ROWS[5], ROWS[6]], ids=str)
def test_an_encoder_decoder_generates_what_it_learns(row: Row, base: Base) -> None:
    """What training would say after each token is what `generate` writes next, with a cache, without, and with beams."""
    model, _, inputs = adapted(row, base)
    del inputs["decoder_input_ids"]
    written = model.generate(**inputs, **GREEDY)
    said = model(**inputs, decoder_input_ids=written[:, :-1]).logits.argmax(-1)
    assert torch.equal(said[:, 1 - written.shape[1] :], written[:, 1:])
    assert torch.equal(model.generate(**inputs, use_cache=False, **GREEDY), written)
    beams = [model.generate(**inputs, num_beams=3, use_cache=cached, **GREEDY) for cached in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("base", [BASES[2], BASES[3]], ids=str)
def test_an_encoder_behind_real_words_generates_as_the_bare_model(base: Base, beams: int) -> None:
    model, bare, inputs = adapted(ROWS[0], base)
    write_words(model)
    options = {**GREEDY, "num_beams": beams}
    longer = in_front(base, inputs, ROWS[0])
    for given in (inputs, longer):
        del given["decoder_input_ids"]
    assert torch.equal(model.generate(**inputs, **options), bare.generate(**longer, **options))


@pytest.mark.parametrize("row", [ROWS[0], ROWS[5]], ids=str)
def test_a_cache_may_be_carried_on_by_hand(row: Row) -> None:
    model, _, inputs = adapted(row, BASES[0])
    ids = inputs["input_ids"][:1]
    first = model(input_ids=ids[:, :3], use_cache=True)
    cache = {kv_cache.argument_of(model.get_base_model()): kv_cache.given(first)}
    second = model(input_ids=ids[:, 3:], attention_mask=torch.ones(1, 5), **cache)
    assert_equal([second.logits], [model(input_ids=ids).logits[:, -2:]], exact=False)


class CalledCache(hf.LlamaForCausalLM):
    """A model whose author knows only transformers' new name for the cache, whatever the version."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None, **others):
        own = {kv_cache.argument_of(super()): cache}
        return super().forward(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **own, **others)


class CalledPastKeyValues(hf.LlamaForCausalLM):
    """The same with the old name."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, **others
    ):
        own = {kv_cache.argument_of(super()): past_key_values}
        return super().forward(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **own, **others)


@pytest.mark.parametrize("row", [ROWS[0], ROWS[5]], ids=str)
@pytest.mark.parametrize("spelling", [CalledCache, CalledPastKeyValues])
def test_either_name_of_the_cache_will_do(row: Row, spelling: type[hf.LlamaForCausalLM]) -> None:
    model, _, inputs = adapted(row, BASES[0])
    expected = model(**inputs).logits
    model.get_base_model().__class__ = spelling
    assert torch.equal(model(**inputs).logits, expected)
    ids, name = inputs["input_ids"][:1], kv_cache.argument_of(model.get_base_model())
    first = model(input_ids=ids[:, :3], use_cache=True)
    second = model(input_ids=ids[:, 3:], attention_mask=torch.ones(1, 5), **{name: kv_cache.given(first)})
    assert_equal([second.logits], [model(input_ids=ids).logits[:, -2:]], exact=False)
    assert name == {CalledCache: "cache", CalledPastKeyValues: "past_key_values"}[spelling]


def test_static_caches_are_refused() -> None:
    model, _, inputs = adapted(ROWS[0], BASES[0])
    with pytest.raises(ValueError, match="static caches"):
        model.generate(inputs["input_ids"], cache_implementation="static", **GREEDY)


# -- files ----------------------------------------------------------------------------------------------------------


@table
def test_saved_and_loaded_is_the_same(row: Row, base: Base, tmp_path: Path) -> None:
    model, bare, inputs = adapted(row, base)
    model.save_pretrained(tmp_path / "one")
    again = PeftModel.from_pretrained(bare, tmp_path / "one")
    assert not any(p.requires_grad for p in again.parameters())
    assert_equal(outputs(again, inputs), outputs(model, inputs))
    again.save_pretrained(tmp_path / "two")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_tensors_are_set_where_the_file_holds_all_there_is(row: Row) -> None:
    model, bare, inputs = adapted(row, BASES[0])
    fresh = row.adapt(bare, "CAUSAL_LM")
    state = get_peft_model_state_dict(model)
    if not model.prompt_encoder["default"].method.is_plain:
        with pytest.raises(InputError, match="holds the prompt, not the network that made it"):
            set_peft_model_state_dict(fresh, state)
        return
    set_peft_model_state_dict(fresh, state)
    assert_equal(outputs(fresh, inputs), outputs(model, inputs))


def test_the_config_holds_what_peft_0_13_knows(tmp_path: Path) -> None:
    model, _, _ = adapted(ROWS[0], BASES[5])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config) == {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "num_attention_heads", "num_layers"),
        *("num_transformer_submodules", "num_virtual_tokens", "peft_type", "prompt_tuning_init"),
        *(
            "prompt_tuning_init_text",
            "revision",
            "task_type",
            "token_dim",
            "tokenizer_kwargs",
            "tokenizer_name_or_path",
        ),
    }
    assert config["token_dim"] == 16 and config["num_layers"] == 2 and config["num_attention_heads"] == 2


def test_a_prefix_counts_the_heads_that_have_keys() -> None:
    config = adapted(ROWS[5], BASES[0])[0].peft_config["default"]
    assert (config.token_dim, config.num_attention_heads, config.encoder_hidden_size) == (8, 2, 8)


def test_loaded_prompts_are_for_inference(tmp_path: Path) -> None:
    model, bare, _ = adapted(ROWS[0], BASES[0])
    model.save_pretrained(tmp_path)
    words = "Cannot set a prompt learning adapter to trainable when loading pretrained adapter."
    with pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(bare, tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match=words):
        model.load_adapter(tmp_path, "other", is_trainable=True)


def test_a_file_of_another_length_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    model, bare, inputs = adapted(ROWS[0], BASES[0])
    expected = outputs(bare, inputs)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_virtual_tokens": 10}))
    with pytest.raises(InputError, match=f"num_virtual_tokens: is 10, but the file's prompt has {TOKENS} rows"):
        PeftModel.from_pretrained(bare, tmp_path)
    assert_equal(outputs(bare, inputs), expected)


# -- several adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_prompts_are_switched_loaded_and_deleted(row: Row, tmp_path: Path) -> None:
    model, bare, inputs = adapted(row, BASES[0])
    first = outputs(model, inputs)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    assert_equal(outputs(model, inputs), first)
    model.set_adapter("other")
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad} == {"other"}
    second = outputs(model, inputs)
    assert not torch.equal(first[0], second[0])
    model.save_pretrained(tmp_path)
    model.delete_adapter("default")
    assert_equal(outputs(model, inputs), second)
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    assert_equal(outputs(model, inputs), first)
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("again")
    model.delete_adapter("other")
    inner = model.get_base_model()
    assert not inner._forward_pre_hooks
    assert_equal(outputs(inner, without_tasks(inputs)), outputs(bare, without_tasks(inputs)))


@pytest.mark.parametrize("base", BASES, ids=str)
def test_unloading_leaves_no_trace(base: Base) -> None:
    model, bare, inputs = adapted(ROWS[0], base)
    inner = model.attached.unload(merge=False)
    assert [type(module) for module in inner.modules()] == [type(module) for module in bare.modules()]
    assert not any(module._forward_pre_hooks for module in inner.modules())
    assert_equal(outputs(inner, inputs), outputs(bare, inputs))


def test_a_copied_model_is_on_its_own() -> None:
    model, _, inputs = adapted(ROWS[0], BASES[0])
    before = outputs(model, inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.prompt_encoder["default"].embedding.weight.zero_()
    assert_equal(outputs(model, inputs), before)
    assert not torch.equal(outputs(twin, inputs)[0], before[0])


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("base", [BASES[0], BASES[2]], ids=str)
def test_prompts_stay_in_full_precision_on_a_half_precision_base(row: Row, base: Base) -> None:
    model = row.adapt(base.model().to(torch.bfloat16), base.task)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    said = say(model, base.inputs() | row.tasks(0, 2))[0]
    assert said.dtype == torch.bfloat16 and torch.isfinite(said).all()
    said.float().pow(2).sum().backward()
    model, _, inputs = adapted(row, base)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(outputs(model, inputs)[0]).all()


@table
def test_works_without_tensors_on_the_meta_device(row: Row, base: Base) -> None:
    real, _, _ = adapted(row, base)
    with torch.device("meta"):
        model = base.model()
    planned = row.adapt(model, base.task)
    assert planned.get_nb_trainable_parameters() == real.get_nb_trainable_parameters()
    assert all(p.is_meta for p in planned.parameters())


# -- where prompts start --------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel({"<unk>": 0, "blue": 7, "red": 9, "green": 11, "grey": 4}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("text", ["red blue", "red blue green", "red blue red green grey"])
@pytest.mark.parametrize("method", ["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"])
def test_a_text_is_repeated_or_cut_to_the_prompt_s_length(method: str, text: str, tokenizer: Path) -> None:
    options = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text, "tokenizer_name_or_path": str(tokenizer)}
    base = BASES[0].model()
    model = Row(method, options).adapt(
        base, "CAUSAL_LM", num_virtual_tokens=4, tokenizer_kwargs={"trust_remote_code": True}
    )
    ids = {"red blue": [9, 7, 9, 7], "red blue green": [9, 7, 11, 9]}.get(text, [9, 7, 9, 11])
    words = base.get_input_embeddings().weight[ids]
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, words)


def test_sampled_words_are_words() -> None:
    model, bare, _ = adapted(ROWS[1], BASES[0])
    words = bare.get_input_embeddings().weight
    for row in model.prompt_encoder["default"].embedding.weight:
        assert (words == row).all(1).any()


def test_a_prefix_may_start_at_zero() -> None:
    for row in (ROWS[5], ROWS[6]):
        model = row.adapt(BASES[0].model(), "CAUSAL_LM", init_weights="zero")
        assert not model.prompt_encoder["default"]().any()


@pytest.mark.parametrize("kind", ["folder", "safetensors", "pickle"])
def test_a_task_starts_at_what_source_tasks_learnt(kind: str, tmp_path: Path) -> None:
    source, bare, _ = adapted(ROWS[2], BASES[0])
    source.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    path = {"folder": tmp_path, "safetensors": tmp_path / "adapter_model.safetensors"}.get(kind, tmp_path / "x.bin")
    torch.save(state, tmp_path / "x.bin")

    def start(init: str, **options: Any) -> dict[str, Tensor]:
        settings = {
            "prompt_tuning_init": init,
            "prompt_tuning_init_state_dict_path": str(path),
            "num_ranks": 2,
            **options,
        }
        model = Row("MULTITASK_PROMPT_TUNING", settings).adapt(copy.deepcopy(bare), "CAUSAL_LM")
        assert torch.isfinite(model(torch.tensor([[4, 5]])).logits).all()  # one task need not be named
        return get_peft_model_state_dict(model)

    average, exact = start("AVERAGE_SOURCE_TASKS"), start("EXACT_SOURCE_TASK", prompt_tuning_init_task=2)
    for name in ("prefix_task_cols", "prefix_task_rows"):
        torch.testing.assert_close(average[name], state[name].mean(0, keepdim=True))
        assert torch.equal(exact[name], state[name][2:])
    only = start("ONLY_SOURCE_SHARED", num_ranks=1)
    for found in (average, exact, only):
        assert torch.equal(found["prompt_embeddings"], state["prompt_embeddings"])
    assert only["prefix_task_cols"].shape == (1, TOKENS, 1)


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM"), "num_virtual_tokens: must be given"),
        (PromptTuningConfig(num_virtual_tokens=3), "task_type: is None: a prompt must know the task"),
        (
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=8),
            "is 8, but .* embeddings have 16",
        ),
        (
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init=PromptTuningInit.TEXT),
            "When prompt_tuning_init='TEXT', tokenizer_name_or_path can't be None.",
        ),
        (
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, tokenizer_kwargs={"use_fast": True}),
            "tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.",
        ),
        (
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init="WORDS"),
            "'WORDS' is no way to start a prompt",
        ),
        (
            PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_reparameterization_type="GRU"),
            "Prompt encoder type not recognized. Please use one of MLP .recommended. or LSTM.",
        ),
        (
            MultitaskPromptTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init="AVERAGE_SOURCE_TASKS"
            ),
            "prompt_tuning_init_state_dict_path needs to be specified with AVERAGE_SOURCE_TASKS init method",
        ),
        (
            MultitaskPromptTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=3,
                num_tasks=2,
                prompt_tuning_init="EXACT_SOURCE_TASK",
                prompt_tuning_init_state_dict_path="x",
            ),
            "num_tasks: one task starts",
        ),
        (
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, modules_to_save=["nowhere"]),
            "nowhere.* name no module",
        ),
    ],
    ids=range(10),
)
def test_a_config_that_does_not_fit_is_refused_and_changes_nothing(config: Any, words: str) -> None:
    base = BASES[0].model()
    with pytest.raises(InputError, match=words):
        get_peft_model(base, config)
    assert all(p.requires_grad for p in base.parameters())
    assert not base._forward_pre_hooks


def test_what_makes_no_sense_is_refused() -> None:
    model, _, inputs = adapted(ROWS[2], BASES[0])
    ids = inputs["input_ids"]
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        model(ids)
    with pytest.raises(ValueError, match="task_ids: names a task that is not there"):
        model(ids, task_ids=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="3 tasks for 2 rows"):
        model(ids, task_ids=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="can't be used with prompts"):
        model(ids, adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("other", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="cannot be merged"):
        model.attached.merge()
    with pytest.raises(ValueError, match="does not support prompt learning"):
        inject_adapter_in_model(PrefixTuningConfig(num_virtual_tokens=3), BASES[0].model())
    model.add_adapter("other", model.peft_config["default"])
    with pytest.raises(ValueError, match="one prompt at a time"):
        model.set_adapter(["default", "other"])


def test_positions_and_token_types_that_are_ignored_are_told() -> None:
    model, _, inputs = adapted(ROWS[0], BASES[0])
    plain = outputs(model, inputs)
    with pytest.warns(UserWarning, match="Position ids are not supported for parameter efficient tuning"):
        assert_equal(outputs(model, {**inputs, "position_ids": torch.arange(5).expand(2, -1) + 9}), plain)
    model, _, inputs = adapted(ROWS[0], BASES[1])
    plain = outputs(model, inputs)
    with pytest.warns(UserWarning, match="Token type ids are not supported for parameter efficient tuning"):
        assert_equal(outputs(model, {**inputs, "token_type_ids": torch.ones(2, 5).long()}), plain)


def test_a_decoder_that_classifies_by_its_last_token_must_be_padded_on_the_left() -> None:
    model, _, inputs = adapted(ROWS[0], BASES[4])
    with pytest.raises(InputError, match="pad on the left"):
        model(**{**inputs, "attention_mask": inputs["attention_mask"].flip(1)})


def test_a_model_without_a_cache_takes_no_prefix() -> None:
    import transformers as hf

    config = hf.DistilBertConfig(vocab_size=32, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    with pytest.raises(ValueError, match="Model does not support past key values"):
        ROWS[5].adapt(hf.DistilBertForSequenceClassification(config), TaskType.SEQ_CLS)


def test_recipes_refuse_what_a_prompt_has_not() -> None:
    section = AdapterSection.model_validate({"method": "prompt_tuning", "num_virtual_tokens": 8})
    assert section.config == PromptTuningConfig(num_virtual_tokens=8)
    for given, words in (({"target_modules": ["q"]}, "target_modules"), ({}, "num_virtual_tokens")):
        with pytest.raises(ValueError, match=words):
            AdapterSection.model_validate({"method": "prefix_tuning", **given})


def test_recipes_refuse_a_prefix_with_checkpointing() -> None:
    recipe: dict[str, Any] = {
        "model": {"name_or_path": "base"},
        "adapter": {"method": "prefix_tuning", "num_virtual_tokens": 8},
        "data": {"train": "train.jsonl"},
        "training": {"output_dir": "out", "gradient_checkpointing": True},
    }
    with pytest.raises(ValueError, match="PREFIX_TUNING does not work with gradient checkpointing"):
        Recipe.model_validate(recipe)
    recipe["adapter"]["method"] = "prompt_tuning"
    assert Recipe.model_validate(recipe).training.gradient_checkpointing
