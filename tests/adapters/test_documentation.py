"""What PEFT's guides show, on tiny models, with nothing but the import changed: a test an example, named by its page."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, T5Model

import peftcli
from peftcli import (
    AdaLoraConfig,
    AdaLoraModel,
    BaseTunerLayer,
    CordaConfig,
    EvaConfig,
    IA3Config,
    IA3Model,
    LoHaConfig,
    LoraConfig,
    LoraModel,
    LoraRuntimeConfig,
    OFTConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PeftModelForSeq2SeqLM,
    TaskType,
    cast_mixed_precision_params,
    convert_to_lora,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter_from_state_dict,
    initialize_lora_eva_weights,
    inject_adapter_in_model,
    load_peft_weights,
    preprocess_corda,
    save_as_lora,
    set_peft_model_state_dict,
)
from tests.adapters.small import IDS, llama


def t5(kind: Callable[[T5Config], Any] = T5ForConditionalGeneration) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return kind(T5Config(**sizes, decoder_start_token_id=0))


class Dummy(nn.Module):
    """Embedding, linear layer, head, as in the low-level guide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 10)
        self.linear = nn.Linear(10, 10)
        self.lm_head = nn.Linear(10, 10)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.linear(self.embedding(input_ids)))


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, str]:
    """Three trained LoRAs of the same base, by name."""
    for seed, name in enumerate(("sft", "dpo", "sql")):
        model = get_peft_model(llama(2), LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.3)
        model.save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in ("sft", "dpo", "sql")}


# -- quicktour, configuration ---------------------------------------------------------------------------------------


def test_configs_are_saved_loaded_and_made_by_name(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=32, task_type=TaskType.CAUSAL_LM, inference_mode=False, lora_dropout=0.1)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, LoraConfig) and (loaded.r, loaded.inference_mode) == (4, True)
    assert LoraConfig.from_pretrained(tmp_path, inference_mode=False, revision=None) == config
    assert PeftConfig.from_json_file(tmp_path / "adapter_config.json")["lora_alpha"] == 32
    assert PeftConfig.from_peft_type(peft_type="IA3", target_modules=["q"]) == IA3Config(target_modules=["q"])
    assert IA3Config(peft_type="IA3", target_modules=["q"]) == IA3Config(target_modules=["q"])
    with pytest.raises(ValueError, match="peft_type: is 'LORA', but this is IA3Config"):
        IA3Config(peft_type="LORA")
    with pytest.raises(TypeError, match="unexpected keyword"):
        LoraConfig.from_pretrained(tmp_path, rank=3)


def test_the_second_adapter_is_added_and_activated() -> None:
    model = get_peft_model(llama(2), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter(adapter_name="new_adapter", peft_config=LoraConfig(target_modules=["q_proj"], r=2))
    assert model.active_adapter == "default"
    model.set_adapter("new_adapter")
    assert (model.active_adapter, model.base_model.active_adapter) == ("new_adapter", "new_adapter")
    assert set(model.base_model.peft_config) == {"default", "new_adapter"}


def test_nothing_is_uploaded(adapters: dict[str, str]) -> None:
    """`push_to_hub` must not reach the base model's, which would upload all of it."""
    model = PeftModel.from_pretrained(llama(2), adapters["sft"])
    for one in (model, LoraConfig()):
        with pytest.raises(ValueError, match=r"uploads nothing[^$]*hf upload me/my-adapter"):
            one.push_to_hub("me/my-adapter", private=True)


# -- LoRA guide -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["gaussian", False, "pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_starts_by_name(init: Any) -> None:
    base = llama(2)
    expected = base(IDS).logits
    model = get_peft_model(base, LoraConfig(init_lora_weights=init, r=4))
    close = torch.allclose(model(IDS).logits, expected, atol=1e-4)
    assert close == (init is not False)


def test_corda_s_and_eva_s_passes_over_data() -> None:
    model = llama(2)
    config = LoraConfig(init_lora_weights="corda", r=2, corda_config=CordaConfig(corda_method="kpm"))
    preprocess_corda(model, config, run_model=lambda: model(IDS))
    assert get_peft_model(model, config).active_peft_config.corda_config.corda_method == "kpm"
    config = LoraConfig(init_lora_weights="eva", r=2, eva_config=EvaConfig(rho=2.0))
    model = get_peft_model(llama(2), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(model, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}] * 4)
    assert torch.isfinite(model(IDS).logits).all()


def test_pissa_is_saved_converted_or_asked_to(tmp_path: Path) -> None:
    model = get_peft_model(llama(2), LoraConfig(init_lora_weights="pissa", r=2, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "start")
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    loaded = PeftModel.from_pretrained(llama(2), tmp_path / "end")
    torch.testing.assert_close(loaded(IDS).logits, model.eval()(IDS).logits)


def test_dora_s_settings_of_the_process(adapters: dict[str, str], tmp_path: Path) -> None:
    runtime = LoraRuntimeConfig(ephemeral_gpu_offload=True)
    config = LoraConfig(use_dora=True, runtime_config=runtime, task_type="CAUSAL_LM")
    assert "runtime_config" not in config.to_dict()
    model = get_peft_model(llama(2), config)
    model.save_pretrained(tmp_path / "dora")
    model = PeftModel.from_pretrained(llama(2), tmp_path / "dora", ephemeral_gpu_offload=True)
    model.load_adapter(tmp_path / "dora", "other", ephemeral_gpu_offload=True, torch_device="cpu")
    assert model.base_model.model.model.layers[0].self_attn.q_proj.use_dora == {"default": True, "other": True}


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ({"foo": 42}, {"foo", "module.foo", "module.module.foo"}),
        ({"^foo": 42}, {"foo"}),
        ({"^module.foo": 42}, {"module.foo"}),
        ({"module.foo": 42}, {"module.foo", "module.module.foo"}),
        ({"^foo": 42, "^module.module.foo": 42}, {"foo", "module.module.foo"}),
    ],
)
def test_rank_patterns_as_the_guide_reads_them(pattern: dict[str, int], layers: set[str]) -> None:
    def level(*, inside: nn.Module | None = None, **linear: int) -> nn.Module:
        parts: dict[str, nn.Module] = {name: nn.Linear(4, 4) for name in linear}
        return nn.ModuleDict(parts | ({"module": inside} if inside is not None else {}))

    outer = level(foo=1, inside=level(foo=1, foobar=1, inside=level(foo=1, barfoo=1)))
    model = get_peft_model(outer, LoraConfig(r=2, target_modules=["foo", "foobar", "barfoo"], rank_pattern=pattern))
    assert {name for name, layer in model.attached.layers() if layer.r["default"] == 42} == layers


def test_layers_are_replicated() -> None:
    config = LoraConfig(layer_replication=[[0, 2], [1, 2]], task_type="CAUSAL_LM")
    model = get_peft_model(llama(2), config)
    assert len(model.base_model.model.model.layers) == 3
    assert len(model.targeted_module_names) == 6


def test_adapters_are_merged_unmerged_weighted_and_unloaded(adapters: dict[str, str]) -> None:
    model = PeftModel.from_pretrained(llama(2), adapters["sft"], adapter_name="sft")
    sft = model(IDS).logits
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, sft)
    result = model.load_adapter(adapters["dpo"], adapter_name="dpo")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    model.add_weighted_adapter(
        adapters=["sft", "dpo"], weights=[0.7, 0.3], adapter_name="sft-dpo", combination_type="linear"
    )
    model.set_adapter("sft-dpo")
    assert not torch.allclose(model(IDS).logits, sft)
    model.delete_adapter("dpo")
    assert torch.equal(model.unload()(IDS).logits, llama(2)(IDS).logits)


def test_rows_of_one_batch_have_their_own_adapters(adapters: dict[str, str]) -> None:
    model = PeftModel.from_pretrained(llama(2), adapters["sft"], adapter_name="french")
    model.load_adapter(adapters["dpo"], adapter_name="german")
    rows = IDS[:1].expand(3, -1)
    inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "max_new_tokens": 3, "do_sample": False}
    output = model.generate(**inputs, adapter_names=["__base__", "french", "german"], pad_token_id=0)
    for row, name in zip(output, (None, "french", "german"), strict=True):
        model.set_adapter(name or "french")
        one = {**inputs, "input_ids": rows[:1], "attention_mask": torch.ones_like(rows[:1]), "pad_token_id": 0}
        single = model.get_base_model() if name else llama(2)
        assert torch.equal(single.generate(**one)[0], row)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
        model(rows, adapter_names=["french"])


# -- merging, mixed models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ties", "dare_ties", "dare_linear", "magnitude_prune", "ties_svd"])
def test_three_adapters_become_one(adapters: dict[str, str], kind: str) -> None:
    model = PeftModel.from_pretrained(llama(2), adapters["sft"], adapter_name="sft")
    for name in ("dpo", "sql"):
        _ = model.load_adapter(adapters[name], adapter_name=name)
    torch.manual_seed(0)
    model.add_weighted_adapter(list(adapters), [2.0, 1.0, 1.0], "merge", combination_type=kind, density=0.5)
    model.set_adapter("merge")
    assert torch.isfinite(model(IDS).logits).all()
    assert not torch.equal(model(IDS).logits, llama(2)(IDS).logits)


def test_adapters_of_different_methods_act_together(adapters: dict[str, str], tmp_path: Path) -> None:
    get_peft_model(llama(2), LoHaConfig(target_modules=["q_proj"], init_weights=False)).save_pretrained(tmp_path / "l")
    model = PeftMixedModel.from_pretrained(llama(2), adapters["sft"])
    model.load_adapter(tmp_path / "l", adapter_name="other")
    lora = model(IDS).logits
    model.set_adapter(["default", "other"])
    assert not torch.allclose(model(IDS).logits, lora)


# -- low-level API, custom models -----------------------------------------------------------------------------------


def test_an_adapter_is_injected_saved_and_loaded() -> None:
    config = LoraConfig(lora_alpha=16, lora_dropout=0.1, r=64, bias="none", target_modules=["linear"])
    model = inject_adapter_in_model(config, Dummy())
    nn.init.normal_(model.linear.lora_B["default"].weight)
    state = get_peft_model_state_dict(model)
    assert sorted(state) == [f"linear.lora_{part}.weight" for part in "AB"]
    again = inject_adapter_in_model(config, Dummy(), low_cpu_mem_usage=True)
    outcome = set_peft_model_state_dict(again, state, low_cpu_mem_usage=True)
    assert outcome.unexpected_keys == []
    ids = torch.arange(8)[None]
    assert torch.equal(again.eval()(ids), model.eval()(ids))


def test_the_tensors_say_which_modules_are_adapted() -> None:
    state = get_peft_model_state_dict(inject_adapter_in_model(LoraConfig(target_modules=["linear"]), Dummy()))
    model = inject_adapter_in_model(LoraConfig(target_modules=["lm_head", "linear"]), Dummy(), state_dict=state)
    assert set_peft_model_state_dict(model, state).missing_keys == []
    assert isinstance(model.linear, BaseTunerLayer) and type(model.lm_head) is nn.Linear
    with pytest.raises(ValueError, match="no module of this model"):
        inject_adapter_in_model(LoraConfig(), Dummy(), state_dict={"other.lora_A.weight": torch.ones(1)})


def test_functions_for_models_without_a_wrapper() -> None:
    model = inject_adapter_in_model(LoraConfig(target_modules=["linear"]), Dummy())
    model = inject_adapter_in_model(LoraConfig(target_modules=["linear"]), model, adapter_name="other")
    peftcli.set_adapter(model, "other")
    layer = model.linear
    assert isinstance(layer, BaseTunerLayer) and layer.active_adapter == ["other"]
    peftcli.set_requires_grad(model, ["other"], requires_grad=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.bfloat16()
    peftcli.cast_adapter_dtype(model, "other")
    assert (layer.lora_A["other"].weight.dtype, layer.lora_A["default"].weight.dtype) == (torch.float32, torch.bfloat16)
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        peftcli.delete_adapter(model, "other")
    assert set(layer.lora_A) == {"default"}
    with pytest.raises(ValueError, match="Adapter nobody not found"):
        peftcli.set_requires_grad(model, "nobody")


def test_what_was_adapted_can_be_asked() -> None:
    model = get_peft_model(llama(2), LoraConfig(target_modules=["q_proj"]))
    assert model.targeted_module_names == [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]


def test_scalings_are_read_and_set_at_the_layer() -> None:
    model = get_peft_model(Dummy(), LoraConfig(target_modules=["linear"], lora_alpha=16, init_lora_weights=False))
    layer, x = model.base_model.model.linear, torch.ones(1, 10)
    assert (layer.r, layer.lora_alpha, layer.scaling) == ({"default": 8}, {"default": 16}, {"default": 2.0})
    single = layer(x) - layer.get_base_layer()(x)
    changes: list[tuple[Callable[[], Any], float]] = [
        (lambda: layer.scaling.__setitem__("default", 6.0), 3),
        (lambda: layer.set_scale("default", 0.5), 0.5),
        (lambda: layer.scale_layer(4.0), 2),
        (lambda: layer.unscale_layer(2.0), 1),
        (lambda: layer.scale_layer(3.0), 3),
        (lambda: layer.unscale_layer(), 1),
    ]
    for change, factor in changes:
        change()
        torch.testing.assert_close(layer(x) - layer.get_base_layer()(x), factor * single)
    with pytest.raises(TypeError, match="does not support item assignment"):
        layer.r["default"] = 4


@pytest.mark.parametrize(
    ("tuner", "config"),
    [
        (LoraModel, LoraConfig(task_type="SEQ_2_SEQ_LM", r=8, lora_alpha=32, target_modules=["q", "v"])),
        (IA3Model, IA3Config(peft_type="IA3", target_modules=["k", "v", "wo"], feedforward_modules=["wo"])),
        (AdaLoraModel, AdaLoraConfig(peft_type="ADALORA", init_r=12, target_modules=["q", "v"], total_step=9)),
    ],
)
def test_tuners_by_their_own_names(tuner: type[nn.Module], config: Any) -> None:
    model = tuner(t5(), config, "default")
    assert isinstance(model.merge_and_unload(), T5ForConditionalGeneration)
    assert type(get_peft_model(t5(), config).base_model) is tuner
    with pytest.raises(AttributeError):
        peftcli.PromptTuningModel  # noqa: B018


def test_tables_of_methods_and_tasks() -> None:
    """A type's name and its member of the enumeration are one key."""
    assert peftcli.PEFT_TYPE_TO_CONFIG_MAPPING[peftcli.PeftType.LORA] is LoraConfig
    assert peftcli.PEFT_TYPE_TO_TUNER_MAPPING["LORA"] is LoraModel
    assert "PROMPT_TUNING" not in peftcli.PEFT_TYPE_TO_TUNER_MAPPING
    assert peftcli.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TaskType.SEQ_2_SEQ_LM] is PeftModelForSeq2SeqLM


def test_a_class_of_a_task_takes_a_config_made_of_a_dictionary() -> None:
    values = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "inference_mode": False,
        "r": 8,
        "target_modules": ["q"],
    }
    model = PeftModelForSeq2SeqLM(t5(), get_peft_config({**values, "lora_alpha": 32, "enable_lora": None}))
    assert model.get_nb_trainable_parameters()[0] == 3 * 8 * (16 + 16)


# -- checkpoint format, troubleshooting -----------------------------------------------------------------------------


def test_a_file_made_by_hand_loads(tmp_path: Path) -> None:
    """`base_model.model.` + path + name, no adapter name, and the three fields that say something."""
    factors = {"lora_A.weight": torch.randn(2, 10), "lora_B.weight": torch.randn(10, 2)}
    save_file({f"base_model.model.linear.{k}": t for k, t in factors.items()}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "target_modules": ["linear"], "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    merged = PeftModel.from_pretrained(Dummy(), tmp_path).merge_and_unload()
    expected = Dummy().linear.weight + 2 * factors["lora_B.weight"] @ factors["lora_A.weight"]
    torch.testing.assert_close(merged.linear.weight, expected)
    assert load_peft_weights(tmp_path, device="cpu").keys() == load_file(tmp_path / "adapter_model.safetensors").keys()


def test_embeddings_named_as_targets_are_stored_with_the_adapter(tmp_path: Path) -> None:
    targets = ["embed_tokens", "lm_head", "q_proj", "v_proj"]
    get_peft_model(llama(2), LoraConfig(target_modules=targets)).save_pretrained(tmp_path / "auto")
    model = get_peft_model(llama(2), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "asked", save_embedding_layers=True)
    for folder, middle in (("auto", "base_layer."), ("asked", "")):
        names = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert f"base_model.model.lm_head.{middle}weight" in names


def test_state_gathered_elsewhere_is_what_is_saved(tmp_path: Path) -> None:
    """`save_pretrained(..., state_dict=accelerator.get_state_dict(model))`, also for starts that are stored converted."""
    for init in (True, "pissa"):
        model = get_peft_model(llama(2), LoraConfig(r=2, init_lora_weights=init, task_type="CAUSAL_LM"))
        gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name, tensor in gathered.items():
            if "lora_" in name and "start" not in name:
                tensor.mul_(1.5).add_(0.1)
        model.save_pretrained(tmp_path, state_dict=gathered, is_main_process=True, save_function=torch.save)
        before = model.eval()(IDS).logits
        model.load_state_dict(gathered)
        assert not torch.allclose(model(IDS).logits, before)
        torch.testing.assert_close(PeftModel.from_pretrained(llama(2), tmp_path)(IDS).logits, model(IDS).logits)
    del gathered[next(name for name in gathered if "lora_A" in name)]
    with pytest.raises(ValueError, match=r"state_dict: base_model.model.model.layers.0.*lora_A.weight: is missing"):
        model.save_pretrained(tmp_path, state_dict=gathered)


def test_an_adapter_is_loaded_again_into_its_place_and_no_other(adapters: dict[str, str], tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(llama(2), adapters["sft"])
    expected = PeftModel.from_pretrained(llama(2), adapters["dpo"])(IDS).logits
    model.load_adapter(adapters["dpo"], "default")
    assert torch.equal(model(IDS).logits, expected)
    get_peft_model(llama(2), LoraConfig(r=4, lora_alpha=64)).save_pretrained(tmp_path / "stronger")
    with pytest.raises(ValueError, match="Adapter with name 'default' already exists"):
        model.load_adapter(tmp_path / "stronger", "default")
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("where", ["from_pretrained", "load_adapter", "save_pretrained"])
def test_arguments_nobody_knows_are_refused(adapters: dict[str, str], where: str) -> None:
    model = PeftModel.from_pretrained(llama(2), adapters["sft"])
    call = {
        "from_pretrained": lambda **more: PeftModel.from_pretrained(llama(2), adapters["sft"], **more),
        "load_adapter": lambda **more: model.load_adapter(adapters["sft"], "other", **more),
        "save_pretrained": lambda **more: model.save_pretrained(adapters["sft"], **more),
    }[where]
    with pytest.raises(TypeError, match="unexpected keyword argument 'safe_serialisation'"):
        call(safe_serialisation=True)


def test_half_precision_weights_are_cast_for_a_gradient_scaler() -> None:
    model = get_peft_model(llama(2).half(), LoraConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float16}
    cast_mixed_precision_params(model, dtype=torch.float16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_the_status_is_printed_as_in_the_guide() -> None:
    model = get_peft_model(t5(T5Model), LoraConfig())
    layer = model.get_layer_status()[0]
    assert layer.name.endswith("encoder.block.0.layer.0.SelfAttention.q")
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("T5Model", "LoraModel")
    assert (status.num_adapter_layers, status.active_adapters) == (6, ["default"])


def test_a_whole_model_is_pickled(adapters: dict[str, str]) -> None:
    model = PeftModel.from_pretrained(llama(2), adapters["sft"])
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS).logits, model(IDS).logits)


# -- hot swapping, conversion ---------------------------------------------------------------------------------------


def test_an_adapter_is_swapped_for_tensors_in_memory(adapters: dict[str, str]) -> None:
    model = PeftModel.from_pretrained(llama(2), adapters["sft"])
    new = load_peft_weights(adapters["dpo"])
    hotswap_adapter_from_state_dict(model, new, "default", config=LoraConfig.from_pretrained(adapters["dpo"]))
    assert torch.equal(model(IDS).logits, PeftModel.from_pretrained(llama(2), adapters["dpo"])(IDS).logits)


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=["q_proj", "up_proj"]),
        LoraConfig(r=4, use_dora=True),
        OFTConfig(oft_block_size=4),
    ],
    ids=["loha", "dora", "oft"],
)
def test_any_update_becomes_lora(config: Any, tmp_path: Path) -> None:
    if config.target_modules is None:
        config.target_modules = {"q_proj", "up_proj"}
    model = get_peft_model(llama(2), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    expected = model.eval()(IDS).logits
    assert model.supports_lora_conversion()
    lora_config, state = convert_to_lora(model, rank=16)
    lora = get_peft_model(llama(2), lora_config)
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(lora.eval()(IDS).logits, expected, atol=1e-4, rtol=1e-3)
    save_as_lora(tmp_path / "small", model, rank=0.5)
    small = PeftModel.from_pretrained(llama(2), tmp_path / "small")
    assert 1 <= small.peft_config["default"].r < 16
    assert torch.equal(model(IDS).logits, expected), "the model is left as it was"


def test_what_lora_can_not_hold_is_refused() -> None:
    for config, why in (
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), None),
        (LoraConfig(alora_invocation_tokens=[3], task_type="CAUSAL_LM"), "more than updates of weights"),
        (LoraConfig(bias="all"), "trained biases"),
        (LoraConfig(init_lora_weights="pissa", r=2), "a start taken from the base"),
    ):
        model = get_peft_model(llama(2), config)
        assert model.supports_lora_conversion() is (why is None)
        if why:
            with pytest.raises(ValueError, match=f"(?i){why}"):
                convert_to_lora(model, rank=4)
    with pytest.raises(ValueError, match=r"rank: is 1.5"):
        convert_to_lora(get_peft_model(llama(2), LoraConfig()), rank=1.5)
