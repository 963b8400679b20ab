"""LLaMA-Adapter on the attention of whole models: the promises of the property table, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from peftcli import AdaptionPromptConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peftcli.errors import InputError

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
CONFIGS = {
    "llama": hf.LlamaConfig(**SMALL, **GROUPED, attention_bias=True),
    "mistral": hf.MistralConfig(**SMALL, **GROUPED, head_dim=8),
    "gpt2": hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=32, initializer_range=0.3),
}
IDS = torch.tensor([[5, 8, 13, 21], [6, 7, 30, 31], [9, 3, 3, 1]])

every_model = pytest.mark.parametrize("kind", CONFIGS)


def base(kind: str) -> Any:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero in a fresh model, so that nobody would notice it being added twice
                parameter.normal_()
    return model.eval()


def config(**options: Any) -> AdaptionPromptConfig:
    return AdaptionPromptConfig(**{"adapter_len": 3, "adapter_layers": 2, "task_type": "CAUSAL_LM", **options})


def adapted(kind: str, *, seed: int | None = 1) -> PeftModel:
    """A model whose adapter is open: at random, its gate too."""
    model = get_peft_model(base(kind), config()).eval()
    if seed is not None:
        open_gates(model, seed)
    return model


def open_gates(model: PeftModel, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()


@torch.no_grad()
def logits(model: Any, **options: Any) -> torch.Tensor:
    return model(IDS, **options).logits


@every_model
def test_a_fresh_one_changes_nothing_and_a_closed_one_neither(kind: str) -> None:
    bare = base(kind)
    expected = logits(bare)
    model = get_peft_model(bare, config()).eval()
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-5)
    open_gates(model, 1)
    assert not torch.allclose(logits(model), expected, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@every_model
def test_it_sits_in_the_top_layers(kind: str) -> None:
    model = adapted(kind)
    paths = [path for path, _ in model.attached.layers()]
    assert [path.split(".")[2] for path in paths] == ["1", "2"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    prefix = "base_model.model."
    assert trained == {f"{prefix}{p}.adaption_{part}.default" for p in paths for part in ("prompt", "gate")}
    assert model.get_nb_trainable_parameters()[0] == 2 * (3 * 16 + 1)


@every_model
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_every_parameter_gets_a_gradient(kind: str, reentrant: bool | None) -> None:
    def gradients(model: PeftModel) -> list[torch.Tensor]:
        model.train()(IDS, use_cache=False).logits.pow(2).sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain = gradients(adapted(kind) if kind != "gpt2" else without_dropout(adapted(kind)))
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in plain)
    if reentrant is None:
        return
    model = adapted(kind) if kind != "gpt2" else without_dropout(adapted(kind))
    inner = model.get_base_model()
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:
        inner.enable_input_require_grads()
    for one, other in zip(plain, gradients(model), strict=True):
        torch.testing.assert_close(one, other)


def without_dropout(model: PeftModel) -> PeftModel:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@every_model
def test_saved_and_loaded_is_the_same(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    model.save_pretrained(tmp_path / "one")
    again = PeftModel.from_pretrained(base(kind), tmp_path / "one", is_trainable=True).eval()
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "two")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    site = "transformer.h.2.attn" if kind == "gpt2" else "model.layers.2.self_attn"
    shapes = {
        key: list(tensor.shape) for key, tensor in load_file(tmp_path / "one" / "adapter_model.safetensors").items()
    }
    assert shapes[f"base_model.model.{site}.adaption_prompt"] == [1, 3, 16]
    assert shapes[f"base_model.model.{site}.adaption_gate"] == [1]
    saved = (tmp_path / "one" / "adapter_config.json").read_text()
    assert f'"target_modules": "{site.rpartition(".")[2]}"' in saved
    assert "modules_to_save" not in saved


@every_model
def test_generation_equals_one_argmax_after_the_other(kind: str) -> None:
    model, expected = adapted(kind), IDS[:1]
    for _ in range(6):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    for cached in (True, False):
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert torch.equal(model.generate(IDS[:1], use_cache=cached, **options), expected)


@every_model
def test_several_adapters_switch_mix_and_leave(kind: str) -> None:
    model = adapted(kind)
    model.add_adapter("other", config(adapter_len=5, adapter_layers=1))
    model.set_adapter("other")
    open_gates(model, 2)
    singles = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        singles[name] = logits(model)
    mixed = logits(model, adapter_names=["other", "__base__", "default"])
    expected = [singles["other"][0], logits(base(kind))[1], singles["default"][2]]
    torch.testing.assert_close(mixed, torch.stack(expected), atol=1e-5, rtol=1e-5)
    model.delete_adapter("default")
    assert torch.equal(logits(model), singles["other"])
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    bare = model.unload()
    assert [type(m) for m in bare.modules()] == [type(m) for m in base(kind).modules()]
    torch.testing.assert_close(logits(bare), logits(base(kind)))


@every_model
def test_half_precision_base_and_no_tensors_at_all(kind: str) -> None:
    model = get_peft_model(base(kind).to(torch.bfloat16), config())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    open_gates(model, 1)
    output = model(IDS).logits
    assert output.dtype == torch.bfloat16 and torch.isfinite(output).all()
    with torch.device("meta"):
        planned = get_peft_model(hf.AutoModelForCausalLM.from_config(CONFIGS[kind]), config())
    assert planned.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adapter_layers": 4}, "Config specifies more adapter layers '4' than the model has '3'"),
        ({"adapter_len": None}, "adapter_len: must be given"),
        ({"target_modules": "self_atn"}, "Target modules .*self_atn.* not found"),
        ({"modules_to_save": ["lm_head"]}, "AdaptionPromptConfig has no such field"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_and_changes_nothing(options: dict, words: str) -> None:
    model = base("llama")
    with pytest.raises(InputError, match=words):
        get_peft_model(model, config(**options))
    assert all(p.requires_grad for p in model.parameters())


def test_other_types_of_models_are_refused() -> None:
    model = hf.AutoModelForCausalLM.from_config(hf.Qwen2Config(**SMALL, **GROUPED))
    with pytest.raises(ValueError, match="Unsupported model type for adaption prompt: 'qwen2'"):
        get_peft_model(model, config(target_modules="self_attn"))


def test_a_copied_model_is_on_its_own() -> None:
    model = adapted("llama")
    expected = logits(model)
    open_gates(copy.deepcopy(model), 3)
    assert torch.equal(logits(model), expected)


def test_it_can_be_injected_like_any_other_adapter() -> None:
    model = inject_adapter_in_model(config(), base("llama"))
    assert torch.equal(logits(model), logits(base("llama")))
