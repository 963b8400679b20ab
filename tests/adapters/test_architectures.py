"""LoRA on the architectures people adapt: attach, train, save, load, merge, generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, IDS, Architecture

from peftcli import LoraConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set", "ignore:target_modules. `")

each = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)


def adapted(architecture: Architecture, **options: Any) -> PeftModel:
    config = LoraConfig(**{"r": 2, "target_modules": architecture.targets, "init_lora_weights": False, **options})
    return get_peft_model(architecture.build(), config).eval()


@each
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_saved_loaded_and_merged_compute_the_same(architecture: Architecture, options: dict, tmp_path: Path) -> None:
    model = adapted(architecture, **options)
    with torch.no_grad():
        expected = architecture.run(model)
        assert not torch.allclose(expected, architecture.run(architecture.build()), atol=1e-4)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(architecture.build(), tmp_path)
        torch.testing.assert_close(architecture.run(loaded), expected)
        torch.testing.assert_close(architecture.run(loaded.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


@each
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_every_adapter_is_trained(architecture: Architecture, reentrant: bool | None) -> None:
    model = adapted(architecture).train()
    base: Any = model.get_base_model()
    if reentrant is not None:
        if not base.supports_gradient_checkpointing:
            pytest.skip("transformers has no checkpointing for it")
        base.activation_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            if "input_ids" not in architecture.inputs():
                pytest.skip("reentrant checkpointing needs inputs that take gradients")
            base.enable_input_require_grads()
    architecture.run(model).square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert dead == []


@each
def test_convolutions_too(architecture: Architecture) -> None:
    if not architecture.conv_targets:
        pytest.skip("no convolutions")
    model = adapted(architecture, target_modules=architecture.conv_targets)
    with torch.no_grad():
        expected = architecture.run(model)
        torch.testing.assert_close(architecture.run(model.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


def test_a_weight_that_is_computed_is_refused_by_name() -> None:
    """wav2vec2's positional convolution is weight-normed."""
    architecture = next(a for a in ARCHITECTURES if a.name == "wav2vec2")
    with pytest.raises(ValueError, match=r"pos_conv_embed.*ParametrizedConv1d is not supported"):
        adapted(architecture, target_modules=["conv"])


@each
def test_generation_differs_from_the_base_and_equals_the_merged_model(architecture: Architecture) -> None:
    if "CausalLM" not in architecture.model and "Generation" not in architecture.model:
        pytest.skip("does not generate")
    model = adapted(architecture, lora_alpha=64)
    options = {"input_ids": IDS, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tuned = model.generate(**options)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**options), tuned)
    assert torch.equal(model.generate(**options, use_cache=False), tuned)
    assert torch.equal(model.merge_and_unload().generate(**options), tuned)


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "bert", "t5", "mixtral"])
def test_all_linear_reaches_every_linear_layer_but_the_head(name: str) -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model = adapted(architecture, target_modules="all-linear")
    adapted_now = {path for path, _ in model.base_model.attached.layers()}
    kinds = ("Linear", "Conv1D")
    linear = {path for path, m in architecture.build().named_modules() if type(m).__name__ in kinds}
    assert linear - adapted_now <= {"lm_head", "classifier"}
