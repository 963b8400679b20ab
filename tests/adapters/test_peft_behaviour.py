"""What PEFT does where its documentation leaves room, found by running random calls through both (PEFT 0.21.2)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peftcli import (
    BOFTConfig,
    C3AConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from peftcli.adapters.config import PeftConfig
from tests.adapters.small import X, llama, mlp


def lora(*targets: str, **options: object) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **options)


def trained(model: nn.Module) -> set[str]:
    """The adapters that get gradients."""
    return {name.split(".")[-2] for name, p in model.named_parameters() if "lora_" in name and p.requires_grad}


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (lora("0"), "lora.Linear"),
        (IA3Config(target_modules=["0"], feedforward_modules=[]), "Linear"),
        (HRAConfig(r=2, target_modules=["0"]), "hra.HRALinear"),
        (BOFTConfig(boft_block_size=2, target_modules=["0"]), "boft.Linear"),
        (C3AConfig(block_size=2, target_modules=["0"]), "c3a.C3ALinear"),
        (LNTuningConfig(target_modules=["1"]), "ln_tuning.LNTuningLayer"),
    ],
)
def test_layers_have_peft_s_names(config: PeftConfig, name: str) -> None:
    model = get_peft_model(mlp(), config)
    assert model.get_layer_status()[0].module_type == name
    assert f": {name}(" in repr(model)


def test_layers_of_other_kinds_have_peft_s_names() -> None:
    model = get_peft_model(
        GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2)), lora("wte", "c_attn", fan_in_fan_out=True)
    )
    assert [layer.module_type for layer in model.get_layer_status()] == ["lora.Embedding", "lora.Linear"]
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (16, 48)
    assert layer.adapter_layer_names == ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    assert len(layer.lora_embedding_A) == 0
    assert isinstance(layer.lora_dropout["default"], nn.Identity)


def test_status_counts_modules_trained_in_full() -> None:
    model = get_peft_model(mlp(), lora("0", modules_to_save=["2"]))
    copied = model.get_layer_status()[1]
    assert (copied.name, copied.module_type) == ("model.2", "ModulesToSaveWrapper")
    assert model.get_model_status().num_adapter_layers == 2
    assert model.get_model_status().quantization_backend is None


def test_status_of_an_injected_model_and_of_a_prompt() -> None:
    status = get_model_status(inject_adapter_in_model(lora("0"), mlp()))
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == ("other", "None", {})
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(TypeError, match="prefix tuning and adaption prompt are not supported"):
        get_layer_status(model)


# -- which modules ----------------------------------------------------------------------------------------------------


def test_all_linear_becomes_the_names_it_stands_for(tmp_path: Path) -> None:
    few = get_peft_model(mlp(), LoraConfig(target_modules="all-linear"))
    assert few.peft_config["default"].target_modules == {"0", "2"}
    few.add_weighted_adapter(["default"], [1.0], "part", combination_type="svd")
    many = get_peft_model(llama(layers=3), LoraConfig(target_modules="all-linear"))
    assert many.peft_config["default"].target_modules == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_a_module_named_in_full_need_not_lie_in_a_numbered_layer() -> None:
    model = get_peft_model(mlp(), LoraConfig(target_modules=["0"], layers_to_transform=[5]))
    assert model.targeted_module_names == ["0"]


# -- what is trained --------------------------------------------------------------------------------------------------


def test_set_adapter_trains_what_was_loaded_frozen(tmp_path: Path) -> None:
    get_peft_model(mlp(), lora("0")).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(mlp(), tmp_path)
    assert trained(model) == set()
    model.set_adapter("default")
    assert trained(model) == {"default"}
    model.load_adapter(tmp_path, "other", is_trainable=True)
    assert trained(model) == {"default", "other"}
    model.set_adapter("other", inference_mode=True)
    assert trained(model) == set()


def test_a_weighted_adapter_is_frozen_until_it_is_activated() -> None:
    model = get_peft_model(mlp(), lora("0"))
    model.add_weighted_adapter(["default"], [0.5], "part")
    assert trained(model) == {"default"}
    model.set_adapter("part")
    assert trained(model) == {"part"}


def test_disabled_layers_are_not_trained_and_wake_as_they_were() -> None:
    model = get_peft_model(mlp(), lora("0"))
    model.base_model.disable_adapter_layers()
    model.base_model.disable_adapter_layers()
    assert trained(model) == set()
    model.base_model.enable_adapter_layers()
    assert trained(model) == {"default"}
    model.base_model.set_requires_grad("default", False)
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert trained(model) == set()


def test_the_last_adapter_injected_is_the_active_one() -> None:
    model = inject_adapter_in_model(lora("0"), mlp(), "first")
    first = model(X)
    inject_adapter_in_model(lora("0"), model, "second")
    assert not torch.allclose(model(X), first)
    assert set(model.peft_config) == {"first", "second"}
    assert get_model_status(model).active_adapters == ["second"]


def test_names_that_torch_takes_are_refused_before_anything_is_changed() -> None:
    model = get_peft_model(mlp(), lora("0"))
    with pytest.raises(ValueError, match="'half' is taken"):
        model.add_adapter("half", lora("0"))
    assert list(model.peft_config) == ["default"]


# -- while merged -----------------------------------------------------------------------------------------------------


def test_a_merged_adapter_is_not_deleted_and_others_are() -> None:
    model = get_peft_model(mlp(), lora("0"))
    model.add_adapter("other", lora("0", "2"))
    expected = model(X)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        model.delete_adapter("default")
    model.delete_adapter("other")
    assert model.base_model.model[0].merged
    torch.testing.assert_close(model(X), expected)
    with pytest.raises(ValueError, match="Adapter other does not exist"):
        model.delete_adapter("other")


def test_adding_an_adapter_unmerges_with_a_warning() -> None:
    base = mlp()
    weight = base[0].weight.detach().clone()
    model = get_peft_model(base, lora("0"))
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("other", lora("0"))
    assert torch.equal(model.base_model.model[0].weight, weight)


def test_an_adapter_named_twice_is_merged_once() -> None:
    model = get_peft_model(mlp(), lora("0"))
    expected = model(X)
    model.merge_adapter(["default", "default"])
    torch.testing.assert_close(model(X), expected)
    for kind in (TypeError, ValueError):  # PEFT's today, and 0.13's
        with pytest.raises(kind, match="should be a list of strings, got 'default'"):
            model.merge_adapter("default")


def test_one_adapter_with_biases_stands_beside_others_without() -> None:
    model = get_peft_model(mlp(), lora("0", bias="lora_only"))
    bare = mlp()(X)
    with torch.no_grad():
        model.base_model.model[0].bias.add_(1.0)
    model.add_adapter("other", lora("2"))
    model.set_adapter("other")
    assert torch.equal(model.base_model.model[0](X), mlp()[0](X))
    with model.disable_adapter():
        assert torch.equal(model(X), bare)
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("third", lora("0", bias="all"))


@pytest.mark.parametrize("unload", [False, True])
def test_only_a_list_of_known_adapters_is_merged(unload: bool) -> None:
    model = get_peft_model(mlp(), lora("0"), "b")
    merge = model.merge_and_unload if unload else model.merge_adapter
    with pytest.raises(TypeError, match="should be a list of strings, got 'b'"):
        merge(adapter_names="b")  # its letters are no names
    with pytest.raises(ValueError, match="Adapter nope not found"):
        merge(adapter_names=["nope"])
    merge(adapter_names=[])
    bare = mlp()
    assert torch.equal((model if not unload else model.get_base_model()).state_dict().popitem()[1], bare[2].bias)
    layer = model.get_base_model()[0]
    assert torch.equal(getattr(layer, "base_layer", layer).weight, bare[0].weight)


def test_merging_more_says_what_is_merged_already() -> None:
    model = get_peft_model(mlp(), lora("0"))
    model.add_adapter("other", lora("0"))
    model.merge_adapter(["other"])
    with pytest.warns(UserWarning, match="were merged other. You are now additionally merging default"):
        model.merge_adapter()


# -- one layer --------------------------------------------------------------------------------------------------------


def test_layers_are_switched_one_by_one() -> None:
    model = get_peft_model(mlp(), lora("0", "2"))
    model.add_adapter("other", lora("0", "2"))
    model.set_adapter("other")
    both, layer = model(X), model.base_model.model[0]
    with model.disable_adapter():
        bare = model(X)
    for part in (layer, model.base_model.model[2]):
        part.enable_adapters(False)
    assert torch.equal(model(X), bare)
    assert trained(model) == set()
    for part in (layer, model.base_model.model[2]):
        part.enable_adapters(True)
    assert torch.equal(model(X), both)
    layer.set_adapter("default")
    assert layer.lora_A["default"].weight.requires_grad and not layer.lora_A["other"].weight.requires_grad
    assert get_model_status(model).active_adapters == "irregular"
    layer.set_adapter(["default", "other"], inference_mode=True)
    assert not any(tensor.requires_grad for name, tensor in layer.named_parameters() if "lora_" in name)
    expected = layer.get_delta_weight("default")
    layer.merge(safe_merge=True, adapter_names=["default"])
    torch.testing.assert_close(layer.weight - mlp()[0].weight, expected)
    assert layer.fan_in_fan_out is False


def test_the_copy_that_answers_is_named() -> None:
    model = get_peft_model(mlp(), lora("0", modules_to_save=["2"]))
    assert model.base_model.model[2].active_adapter == ["default"]


# -- what means nothing -----------------------------------------------------------------------------------------------


def test_an_exclusion_that_means_nothing_is_told_and_a_target_that_is_excluded_is_not(
    recwarn: pytest.WarningsRecorder,
) -> None:
    model = get_peft_model(mlp(), lora("0", "2", exclude_modules=["2"]))
    assert model.targeted_module_names == ["0"]
    assert not recwarn.list
    for excluded in (["lin"], "lin.*"):
        with pytest.warns(UserWarning, match=r"exclude_modules: `lin.*` matches no module"):
            get_peft_model(mlp(), lora("0", exclude_modules=excluded))


def test_a_string_of_modules_to_save_is_not_taken_for_its_letters() -> None:
    with pytest.raises(ValueError, match="modules_to_save: 'score' is not accepted"):
        get_peft_model(llama(), LoraConfig(task_type="SEQ_CLS", modules_to_save="score"))


def test_nothing_is_pushed(tmp_path: Path) -> None:
    model = get_peft_model(mlp(), lora("0"))
    model.save_pretrained(tmp_path / "a", push_to_hub=False, max_shard_size="1GB")
    with pytest.raises(ValueError, match="uploads nothing"):
        model.save_pretrained(tmp_path / "b", push_to_hub=True)
    assert not (tmp_path / "b").exists()
