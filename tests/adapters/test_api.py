"""The rest of the Python API: auto classes, hot swap, optimizers, helpers."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import LlamaForCausalLM

import peftcli
from peftcli import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    cast_mixed_precision_params,
    check_if_peft_model,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    load_peft_weights,
    prepare_model_for_compiled_hotswap,
    prepare_model_for_kbit_training,
    rescale_adapter_scale,
    set_peft_model_state_dict,
    shift_tokens_right,
)
from peftcli.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from tests.adapters.small import IDS, X, llama, mlp


def lora(**options: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["0", "2"], "init_lora_weights": False, **options})


def test_every_public_name_can_be_imported() -> None:
    for name in dir(peftcli):
        assert getattr(peftcli, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'LoraConfigg'"):
        peftcli.LoraConfigg  # noqa: B018


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    llama(layers=2).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_auto_classes_load_base_and_adapter(saved: Path) -> None:
    expected = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(saved.parent / "base"), saved)(IDS).logits
    for loader in (AutoPeftModel, AutoPeftModelForCausalLM):
        model = loader.from_pretrained(saved)
        assert type(model).__name__ == "PeftModelForCausalLM"
        assert torch.equal(model(IDS).logits, expected)
    with pytest.raises(ValueError, match="Expected target PEFT class: PeftModelForCausalLM"):
        AutoPeftModelForSequenceClassification.from_pretrained(saved)


def test_an_auto_class_is_a_task_where_the_config_names_none(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "task_type": None}))
    model = AutoPeftModelForCausalLM.from_pretrained(saved)
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert model.get_base_model().lm_head is not None
    with pytest.raises(OSError, match=r"is made by `AutoPeftModel\.from_pretrained"):
        AutoPeftModel()


def test_a_class_of_one_s_own_package_is_imported_if_the_caller_allows_it(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_models.py").write_text(
        "from transformers import LlamaForCausalLM\nclass Mine(LlamaForCausalLM): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((saved / "adapter_config.json").read_text())
    config.update(task_type=None, auto_mapping={"base_model_class": "Mine", "parent_library": "my_models"})
    (saved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"import_allowlist=\['my_models'\]"):
        AutoPeftModel.from_pretrained(saved)
    assert "my_models" not in sys.modules
    model = AutoPeftModel.from_pretrained(saved, import_allowlist=["my_models"])
    assert type(model.get_base_model()).__name__ == "Mine"


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "os", "no.such", None])
def test_auto_mapping_is_a_name_in_transformers_and_nothing_else(saved: Path, name: str | None) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    config.update(task_type=None, auto_mapping={"base_model_class": name, "parent_library": "evil"})
    (saved / "adapter_config.json").write_text(json.dumps(config))
    if name == "LlamaForCausalLM":
        assert type(AutoPeftModel.from_pretrained(saved)) is PeftModel
    else:
        with pytest.raises(ValueError, match="Cannot infer the auto class"):
            AutoPeftModel.from_pretrained(saved)


def test_hot_swap_is_loading_afresh(tmp_path: Path) -> None:
    torch.manual_seed(1)
    get_peft_model(mlp(), lora(r=4, lora_alpha=3)).save_pretrained(tmp_path / "small")
    get_peft_model(mlp(), lora(r=8, use_rslora=True)).save_pretrained(tmp_path / "large")
    get_peft_model(mlp(), lora(target_modules=["0"])).save_pretrained(tmp_path / "partial")
    model = PeftModel.from_pretrained(mlp(), tmp_path / "large")
    for name in ("small", "partial", "large"):
        hotswap_adapter(model, tmp_path / name, "default")
        torch.testing.assert_close(model(X), PeftModel.from_pretrained(mlp(), tmp_path / name)(X))
    small = PeftModel.from_pretrained(mlp(), tmp_path / "small")
    before = small(X)
    with pytest.raises(ValueError, match="prepare_model_for_compiled_hotswap"):
        hotswap_adapter(small, tmp_path / "large", "default")
    assert torch.equal(small(X), before)
    prepare_model_for_compiled_hotswap(small, target_rank=8)
    torch.testing.assert_close(small(X), before)
    hotswap_adapter(small, tmp_path / "large", "default")
    torch.testing.assert_close(small(X), PeftModel.from_pretrained(mlp(), tmp_path / "large")(X))


def test_a_compiled_model_is_not_compiled_again_when_swapped(tmp_path: Path) -> None:
    get_peft_model(mlp(), lora(r=2, lora_alpha=3)).save_pretrained(tmp_path / "one")
    get_peft_model(mlp(), lora(r=4, lora_alpha=9)).save_pretrained(tmp_path / "two")
    model = PeftModel.from_pretrained(mlp(), tmp_path / "one")
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    compiled = torch.compile(model, backend="eager")
    torch._dynamo.reset()  # else what other tests compiled is asked whether it fits, which counts as once more
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled(X)
        hotswap_adapter(model, tmp_path / "two", "default")
        torch.testing.assert_close(compiled(X), PeftModel.from_pretrained(mlp(), tmp_path / "two")(X))


def test_loraplus_gives_b_its_own_rate() -> None:
    model = get_peft_model(mlp(), lora())
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert rates[id(parameter)] == pytest.approx(16e-3 if "lora_B" in name else 1e-3)


def test_lorafa_takes_the_step_of_the_full_gradient_projected_on_a() -> None:
    model = get_peft_model(mlp(), lora(lora_alpha=6))
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-2)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert not a.requires_grad
    full = model.base_model.model[0].base_layer.weight.requires_grad_(True)
    before = b.detach().clone()
    model(X).square().sum().backward()
    wanted = full.grad @ torch.linalg.pinv(a) / (6 / 4)  # argmin |s B A - G|
    optimizer.step()
    torch.testing.assert_close(b.grad, wanted, atol=1e-4, rtol=1e-3)
    assert not torch.equal(b, before)


def test_helpers(saved: Path) -> None:
    assert check_if_peft_model(saved)
    assert not check_if_peft_model(saved.parent / "base")
    assert len(load_peft_weights(saved)) == 8
    assert get_peft_config({"peft_type": "LORA", "r": 3}).r == 3
    labels = torch.tensor([[5, 6, -100]])
    assert shift_tokens_right(labels, 0, 9).tolist() == [[9, 5, 6]]
    model = get_peft_model(mlp(), lora(lora_alpha=8))
    single = model(X) - mlp()(X)
    with rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(model(X), mlp()(X))
    torch.testing.assert_close(model(X) - mlp()(X), single)
    with pytest.raises(TypeError, match="multiplier"), rescale_adapter_scale(model, "2"):
        pass
    cast_mixed_precision_params(model, torch.bfloat16)
    kinds = {p.requires_grad: p.dtype for p in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_preparing_a_half_precision_model_leaves_its_matrices_alone() -> None:
    model = prepare_model_for_kbit_training(llama().to(torch.bfloat16))
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in model.parameters())
    assert model.model.layers[0].gradient_checkpointing


def test_state_dicts_as_peft_passes_them() -> None:
    model = get_peft_model(mlp(), lora())
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    plain, moved = get_peft_model_state_dict(model), get_peft_model_state_dict(model, gathered, "default")
    assert plain.keys() == moved.keys()
    assert all(torch.equal(moved[key], plain[key] + 1) for key in plain)
    compiled = torch.compile(model, backend="eager")
    assert get_peft_model_state_dict(compiled, unwrap_compiled=True).keys() == plain.keys()
    key = next(iter(plain))
    with pytest.warns(UserWarning, match="another shape"):
        result = set_peft_model_state_dict(model, {**moved, key: torch.zeros(1)}, ignore_mismatched_sizes=True)
    assert result.unexpected_keys == []
    now = get_peft_model_state_dict(model)
    assert all(torch.equal(now[name], (plain if name == key else moved)[name]) for name in plain)


# -- PEFT's paths and names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("tuners.lora", "LoraConfig LoraModel LoraLayer get_eva_state_dict convert_to_lora"),
        ("tuners.lora.corda", "preprocess_corda"),
        ("tuners.adalora", "AdaLoraConfig AdaLoraModel"),
        ("tuners.tuners_utils", "BaseTuner BaseTunerLayer set_adapter"),
        (
            "utils",
            "CONFIG_NAME WEIGHTS_NAME SAFETENSORS_WEIGHTS_NAME ModulesToSaveWrapper infer_device PeftType TaskType",
        ),
        ("utils.save_and_load", "get_peft_model_state_dict set_peft_model_state_dict load_peft_weights"),
        ("utils.other", "prepare_model_for_kbit_training _get_submodules transpose"),
        ("utils.hotswap", "hotswap_adapter prepare_model_for_compiled_hotswap"),
        ("helpers", "rescale_adapter_scale check_if_peft_model"),
        ("peft_model", "PeftModel get_layer_status"),
        ("mapping", "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING get_peft_model"),
    ],
)
def test_peft_s_paths_can_be_imported(path: str, names: str) -> None:
    module = importlib.import_module(f"peftcli.{path}")
    assert all(getattr(module, name) is not None for name in names.split())


def test_peft_s_modules_are_attributes_without_an_import_of_their_own() -> None:
    assert peftcli.utils.other.shift_tokens_right is shift_tokens_right
    assert peftcli.tuners.lora.LoraConfig is LoraConfig
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        peftcli.utils.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LoraConfig(rr=3), r"unexpected keyword argument 'rr'"),
        (lambda: LoraConfig(target_module=["0"]), "did you mean `target_modules`"),
        (lambda: get_peft_model(mlp(), {"r": 4}), r"must be a PeftConfig, got <class 'dict'>"),
        (lambda: peftcli.inject_adapter_in_model(mlp(), lora()), "must be a PeftConfig, got"),
        (lambda: get_peft_model(mlp(), lora()).add_adapter("b", "path"), "must be a PeftConfig, got <class 'str'>"),
        (lambda: PeftModel.from_pretrained(mlp(), ".", config={"r": 4}), "must be a PeftConfig, got <class 'dict'>"),
    ],
)
def test_what_is_no_config_or_no_field_is_refused_by_name(call: Callable[[], object], words: str) -> None:
    for kind in (TypeError, ValueError):
        with pytest.raises(kind, match=words):
            call()


def test_a_task_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Invalid task type: 'CAUSAL_LLM'\. Must be one of"):
        get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LLM"))


def test_names_that_are_not_here_say_what_is() -> None:
    with pytest.raises(ImportError, match="ArrowConfig: Arrow routing is not here; XLoraConfig"):
        from peftcli import ArrowConfig  # noqa: F401
    with pytest.raises(ImportError, match="No module named"):
        import peftcli.tuners.nonsense  # noqa: F401


def test_a_lora_layer_is_told_from_others() -> None:
    from peftcli.tuners.lora import LoraLayer

    assert isinstance(get_peft_model(mlp(), lora()).base_model.model[0], LoraLayer)
    other = get_peft_model(mlp(), peftcli.LoHaConfig(r=2, target_modules=["0"]))
    assert not isinstance(other.base_model.model[0], LoraLayer)


def test_a_prompt_is_shown_as_the_model_gets_it() -> None:
    config = peftcli.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(llama(), config)
    prompt = model.get_prompt(2)
    assert prompt.shape == (2, 3, 16)
    assert torch.equal(prompt[0], model.get_prompt_embedding_to_save("default"))
    alone = peftcli.PromptEmbedding(model.active_peft_config, model.get_input_embeddings())
    assert alone(torch.arange(3)[None]).shape == (1, 3, 16)
    with pytest.raises(TypeError, match="not supported for prompt learning"):
        model.set_requires_grad("default", False)
    prefix = get_peft_model(llama(), peftcli.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert prefix.get_prompt(2).get_seq_length() == 3


def test_keys_of_renamed_modules_are_mapped(tmp_path: Path) -> None:
    model = get_peft_model(mlp(), lora())
    model.save_pretrained(tmp_path)
    renamed = nn.Sequential(nn.ModuleDict({"inner": mlp()}))
    mapping = {r"^(\d)": r"0.inner.\1"}
    config = lora(target_modules=["0.inner.0", "0.inner.2"])
    loaded = PeftModel.from_pretrained(renamed, tmp_path, config=config, key_mapping=mapping)
    before, after = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert all(torch.equal(*pair) for pair in zip(after.values(), before.values(), strict=True))


def test_tensors_of_other_shapes_can_be_left_out(tmp_path: Path) -> None:
    get_peft_model(mlp(), lora(r=2)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="another shape"):
        PeftModel.from_pretrained(mlp(), tmp_path, config=lora(), ignore_mismatched_sizes=True)


def test_the_base_s_own_tensors_come_and_go_by_their_own_names() -> None:
    model = get_peft_model(mlp(), lora(modules_to_save=["2"], target_modules=["0"]))
    state = peftcli.get_base_model_state_dict(model)
    assert state.keys() == mlp().state_dict().keys()
    peftcli.set_base_model_state_dict(model, {key: torch.zeros_like(tensor) for key, tensor in state.items()})
    assert not model.base_model.model[0].base_layer.weight.any()
    with pytest.raises(ValueError, match=r"0\.weight: is missing"):
        peftcli.set_base_model_state_dict(model, {key: t for key, t in state.items() if key != "0.weight"})


def test_a_card_is_written_and_updated_and_its_text_kept(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(task_type="CAUSAL_LM"))
    path = tmp_path / "a" / "README.md"
    model.save_pretrained(tmp_path / "a")
    card = ModelCard.load(path)
    assert (card.data.library_name, card.data.base_model) == ("peft", "base")  # never a path of this machine
    assert (card.data.pipeline_tag, card.data.tags) == (
        "text-generation",
        ["base_model:adapter:base", "lora", "peftcli", "transformers"],
    )
    written = path.read_text()
    model.save_pretrained(tmp_path / "a")
    assert path.read_text() == written
    path.write_text("---\nlicense: mit\ntags: [mine]\n---\nMy own words.\n")
    model.save_pretrained(tmp_path / "a")
    card = ModelCard.load(path)
    assert card.data.license == "mit" and "mine" in card.data.tags and "My own words." in card.text
    path.write_text("---\na: [\n---\n")
    with pytest.warns(UserWarning, match="left as it is"):
        model.create_or_update_model_card(tmp_path / "a")
    assert path.read_text() == "---\na: [\n---\n"
