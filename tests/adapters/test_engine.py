"""What the engine promises beside the equations: targets, biases, copies, tied weights, several adapters, bad files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training.tiny import disturbed
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peftcli import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peftcli.adapters.targets import layer_index
from peftcli.errors import InputError


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=True,
    )
    return LlamaForCausalLM(config).eval()


IDS = torch.arange(12).reshape(2, 6)

PEFT_0_13_KEYS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha"),
    *("lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern"),
    *("revision", "target_modules", "task_type", "use_dora", "use_rslora"),
}
"""What 0.13.0 knows of a LoRA config; it refuses files with any other key."""


def lora(**options: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})


def adapted_modules(model: PeftModel) -> list[str]:
    return [path for path, _ in model.base_model.attached.layers()]


# -- targets --------------------------------------------------------------------------------------------------------


def test_default_targets_follow_the_model_type() -> None:
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM"))
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    assert len(adapted_modules(model)) == 6


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    names = adapted_modules(get_peft_model(llama(), lora(target_modules="all-linear")))
    assert len(names) == 3 * 7
    assert "lm_head" not in names
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False but the target module is `Conv1D`"):
        model = get_peft_model(gpt2, LoraConfig(r=2, target_modules="ALL-LINEAR"))
    assert len(adapted_modules(model)) == 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers_to_transform": 1}, {1}),
        ({"layers_to_transform": [0, 2]}, {0, 2}),
        ({"layers_to_transform": [2], "layers_pattern": "layers"}, {2}),
        ({"target_modules": r".*\.1\..*(q|v)_proj"}, {1}),
        ({"exclude_modules": [f"model.layers.0.self_attn.{n}_proj" for n in "qv"]}, {1, 2}),
        ({"exclude_modules": r".*layers\.[12]\..*"}, {0}),
    ],
)
def test_layers_can_be_chosen(options: dict, expected: set[int]) -> None:
    names = adapted_modules(get_peft_model(llama(), lora(**options)))
    assert {layer_index(name) for name in names} == expected
    assert len(names) == 2 * len(expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["qproj"]}, "Target modules .*qproj.* not found in the base model"),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
        ({"target_modules": r"(a+)+\$model"}, "not found|exponential"),
        ({"target_modules": ["input_layernorm"]}, "Target module LlamaRMSNorm.* is not supported"),
        ({"layers_to_transform": [7]}, "layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_to_transform. must also be specified"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "All modules were excluded"),
        ({"modules_to_save": ["lm_haed"]}, "lm_haed"),
        ({"modules_to_save": ["q_proj"]}, "adapted and also trained in full"),
        ({"r": 5, "init_lora_weights": "orthogonal"}, "rank to be even"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_and_changes_nothing(options: dict, words: str) -> None:
    model = llama()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(InputError, match=words):
        get_peft_model(model, lora(**options))
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_target_hidden_by_its_neighbours_is_told() -> None:
    with pytest.warns(UserWarning, match="`k_porj` matches no module"):
        get_peft_model(llama(), lora(target_modules=["q_proj", "k_porj"]))


def test_unknown_model_type_needs_targets() -> None:
    with pytest.raises(ValueError, match="Please specify `target_modules` in `peft_config`"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig())


# -- what is trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_exactly_the_named_biases_are_trained_saved_and_switched(bias: str, tmp_path: Path) -> None:
    base = llama()
    twin = copy.deepcopy(base)
    model = disturbed(get_peft_model(base, lora(bias=bias)))
    names = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    expected = {
        "none": set(),
        "lora_only": {
            f"base_model.model.model.layers.{i}.self_attn.{n}_proj.base_layer.bias" for i in range(3) for n in "qv"
        },
    }
    expected["all"] = expected["lora_only"] | {
        f"base_model.model.model.layers.{i}.self_attn.{n}_proj.bias" for i in range(3) for n in "ko"
    }
    assert names == expected[bias]
    output = model(IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, twin(IDS).logits)
    model.save_pretrained(tmp_path)
    stored = {key for key in load_file(tmp_path / "adapter_model.safetensors") if key.endswith("bias")}
    assert stored == expected[bias]
    assert torch.equal(PeftModel.from_pretrained(twin, tmp_path)(IDS).logits, output)
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, output)


def test_a_second_adapter_with_biases_is_refused() -> None:
    model = get_peft_model(llama(), lora(bias="all"))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("other", lora(bias="lora_only"))
    with pytest.raises(ValueError, match="biases"):
        model.eval()(IDS, adapter_names=["default", "__base__"])


def test_heads_of_a_task_are_trained_in_full() -> None:
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    model = get_peft_model(BertForSequenceClassification(config), LoraConfig(task_type=TaskType.SEQ_CLS, r=2))
    heads = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert heads == {f"base_model.model.classifier.modules_to_save.default.{leaf}" for leaf in ("weight", "bias")}


def test_modules_to_save_are_stored_plainly_and_switched(tmp_path: Path) -> None:
    base = llama()
    twin = copy.deepcopy(base)
    model = disturbed(get_peft_model(base, lora(modules_to_save=["lm_head"])))
    output = model(IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, twin(IDS).logits)
    model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")
    again = PeftModel.from_pretrained(copy.deepcopy(twin), tmp_path)
    assert torch.equal(again(IDS).logits, output)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, output)
    assert set(merged.state_dict()) == set(twin.state_dict())


# -- tied weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merging_into_one_of_two_tied_weights_unties_them(target: str, tmp_path: Path) -> None:
    model = disturbed(get_peft_model(llama(tied=True), lora(target_modules=[target])))
    expected = model(IDS).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits, expected)


def test_a_merge_elsewhere_keeps_the_tie() -> None:
    merged = disturbed(get_peft_model(llama(tied=True), lora())).merge_and_unload()
    assert merged.config.tie_word_embeddings is True
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


# -- several adapters -----------------------------------------------------------------------------------------------


def test_names_that_contain_one_another_stay_apart(tmp_path: Path) -> None:
    model = get_peft_model(llama(), lora(), adapter_name="a1")
    disturbed(model)
    model.add_adapter("a12", lora())
    model.set_adapter("a12")
    disturbed(model, seed=2)
    model.eval()
    outputs = {}
    for name in ("a1", "a12"):
        model.set_adapter(name)
        outputs[name] = model(IDS).logits
    model.save_pretrained(tmp_path)
    for name in ("a1", "a12"):
        assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path / name)(IDS).logits, outputs[name])
    model.set_adapter("a1")
    model.delete_adapter("a12")
    assert torch.equal(model(IDS).logits, outputs["a1"])


def test_only_the_active_adapter_is_trained() -> None:
    model = get_peft_model(llama(), lora())
    model.add_adapter("other", lora())
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"default"}
    model.set_adapter("other")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"other"}
    model.set_adapter("other", inference_mode=True)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]


def test_deleting_the_active_adapter_activates_the_next() -> None:
    model = get_peft_model(llama(), lora())
    model.add_adapter("other", lora())
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]


def test_a_change_of_mode_reaches_module_and_adapters_but_not_their_tensors() -> None:
    """The holders of tensors grow with the adapters, and walking through them made the n-th load slower."""
    model = get_peft_model(llama(), lora(lora_dropout=0.5))
    model.add_adapter("other", lora(lora_dropout=0.5))
    layer = model.eval().base_model.model.model.layers[0].self_attn.q_proj
    assert not layer.training and not layer.base_layer.training
    assert not any(adapter.training for adapter in layer.adapters.values())
    assert layer.lora_A["default"].training  # as it was made
    model.train()
    assert layer.training and layer.base_layer.training and all(a.training for a in layer.adapters.values())


@pytest.mark.parametrize("name", ["a.b", ""])
def test_names_that_would_break_keys_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="adapter name"):
        get_peft_model(llama(), lora(), adapter_name=name)


def test_unknown_names_are_refused_by_name() -> None:
    model = get_peft_model(llama(), lora()).eval()
    for call in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match="nobody"):
            call("nobody")
    with pytest.raises(ValueError, match=r"non-existing adapter.*nobody"):
        model(IDS, adapter_names=["default", "nobody"])
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 1 and 2"):
        model(IDS, adapter_names=["default"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(IDS, adapter_names=["default", "default"])


def test_generation_with_an_adapter_for_each_row() -> None:
    model = disturbed(get_peft_model(llama(), lora(init_lora_weights=False, lora_alpha=64))).eval()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    tuned = model.generate(IDS, **options)
    with model.disable_adapter():
        bare = model.generate(IDS, **options)
    assert not torch.equal(tuned, bare)
    mixed = model.generate(IDS, adapter_names=["__base__", "default"], **options)
    assert torch.equal(mixed, torch.stack([bare[0], tuned[1]]))


def test_the_attributes_people_read() -> None:
    model = get_peft_model(llama(), lora(lora_alpha=8))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 2.0
    assert layer.r["default"] == 4
    assert layer.lora_alpha["default"] == 8
    assert layer.lora_A["default"].weight.shape == (4, 16)
    assert layer.base_layer is layer.get_base_layer()
    assert layer.in_features == 16
    assert layer.merged_adapters == []
    assert layer.active_adapters == ["default"]
    layer.set_scale("default", 3)
    assert layer.scaling["default"] == 6.0


def test_injected_without_a_wrapper() -> None:
    model = inject_adapter_in_model(lora(), llama())
    state = get_peft_model_state_dict(model)
    assert len(state) == 12
    set_peft_model_state_dict(model, {key: torch.ones_like(tensor) for key, tensor in state.items()})
    assert all(torch.equal(t, torch.ones_like(t)) for t in get_peft_model_state_dict(model).values())


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    disturbed(get_peft_model(llama(), lora())).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, change: object) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "adapter_model.safetensors")


def key(layer: int, module: str, leaf: str) -> str:
    return f"base_model.model.model.layers.{layer}.self_attn.{module}_proj.lora_{leaf}.weight"


def test_all_bad_tensors_are_listed_and_the_model_comes_back(saved: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[key(0, "q", "A")]
        tensors["base_model.model.stray.weight"] = torch.zeros(2)
        tensors[key(1, "v", "B")] = torch.zeros(3, 4)

    edit(saved, damage)
    model = llama()
    expected = model(IDS).logits
    with pytest.raises(InputError) as caught:
        PeftModel.from_pretrained(model, saved)
    for words in (
        key(0, "q", "A"),
        "is missing",
        "stray.weight",
        "no adapted module",
        key(1, "v", "B"),
        "[3, 4]",
        "[8, 4]",
    ):
        assert words in str(caught.value)
    assert torch.equal(model(IDS).logits, expected)
    assert not any("base_layer" in name for name, _ in model.named_modules())


def test_keys_with_the_adapter_name_left_in_are_explained(saved: Path) -> None:
    edit(saved, lambda t: t.update({k.replace("weight", "default.weight"): t.pop(k) for k in list(t)}))
    with pytest.raises(InputError, match="not hold the adapter's name"):
        PeftModel.from_pretrained(llama(), saved)


def test_a_nan_is_refused_at_load_and_at_save(saved: Path, tmp_path: Path) -> None:
    edit(saved, lambda t: t[key(0, "q", "A")].fill_(float("nan")))
    with pytest.raises(InputError, match="NaN"):
        PeftModel.from_pretrained(llama(), saved)
    model = get_peft_model(llama(), lora())
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data[0] = float("inf")
    with pytest.raises(InputError, match="not saved"):
        model.save_pretrained(tmp_path / "broken")
    assert not (tmp_path / "broken" / "adapter_model.safetensors").exists()


def test_a_pickle_is_read_only_on_request(saved: Path) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    torch.save(tensors, saved / "adapter_model.bin")
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="allow-pickle"):
        PeftModel.from_pretrained(llama(), saved)
    model = PeftModel.from_pretrained(llama(), saved, allow_pickle=True)
    assert torch.equal(get_peft_model_state_dict(model)[key(0, "q", "A")], tensors[key(0, "q", "A")])


def test_plain_adapters_hold_only_the_keys_of_peft_0_13(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    assert list(config) == sorted(config)
    assert set(config) == PEFT_0_13_KEYS
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["inference_mode"] is True


def test_two_saves_are_byte_identical(tmp_path: Path) -> None:
    for name in ("one", "two"):
        disturbed(get_peft_model(llama(), lora(target_modules=["v_proj", "q_proj", "k_proj"]))).save_pretrained(
            tmp_path / name
        )
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_adapter_of_another_rank_is_refused(saved: Path) -> None:
    config = (saved / "adapter_config.json").read_text()
    (saved / "adapter_config.json").write_text(config.replace('"r": 4', '"r": 8'))
    with pytest.raises(InputError, match=r"\[4, 16\].*\[8, 16\]"):
        PeftModel.from_pretrained(llama(), saved)


def test_embeddings_are_stored_only_when_tokens_were_added(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora())
    assert not any("embed_tokens" in key for key in get_peft_model_state_dict(model))
    grown = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    grown.resize_token_embeddings(50)
    model = get_peft_model(grown, lora())
    assert get_peft_model_state_dict(model)["base_model.model.model.embed_tokens.weight"].shape[0] == 50
    model.save_pretrained(tmp_path / "adapter")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    again.resize_token_embeddings(50)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


def test_a_file_of_peft_0_13_that_lost_its_biases_is_loaded_with_a_warning(tmp_path: Path) -> None:
    """0.13 trains `lora_only` biases and does not save them; some missing and some there is still an error."""
    disturbed(get_peft_model(llama(), lora(bias="lora_only"))).save_pretrained(tmp_path)
    whole = load_file(tmp_path / "adapter_model.safetensors")
    biases = [name for name in whole if name.endswith("bias")]
    edit(tmp_path, lambda t: [t.pop(name) for name in biases[:1]])
    with pytest.raises(InputError, match=r"bias: is missing"):
        PeftModel.from_pretrained(llama(), tmp_path)
    edit(tmp_path, lambda t: [t.pop(name) for name in biases[1:]])
    with pytest.warns(UserWarning, match="the base's biases are used"):
        model = PeftModel.from_pretrained(llama(), tmp_path)
    base_bias = llama().model.layers[0].self_attn.q_proj.bias
    assert torch.equal(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias, base_bias)
