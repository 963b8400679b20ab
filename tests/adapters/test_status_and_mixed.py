"""Status reports, and models with adapters of different methods."""

from __future__ import annotations

import pytest
import torch

from peftcli import (
    IA3Config,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from tests.adapters.small import X, mlp


def lora(*targets: str) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)


def test_status_of_layers_and_model() -> None:
    model = get_peft_model(mlp(), lora("0", "2"))
    model.add_adapter("other", lora("0"))
    first, second = model.get_layer_status()
    assert (first.name, first.module_type, first.enabled) == ("model.0", "lora.Linear", True)
    assert first.active_adapters == ["default"]
    assert first.available_adapters == ["default", "other"]
    assert first.requires_grad == {"default": True, "other": False}
    assert second.available_adapters == ["default"]
    assert first.devices == {"default": ["cpu"], "other": ["cpu"]}
    status = model.get_model_status()
    assert status.base_model_type == "Sequential"
    assert status.peft_types == {"default": "LORA", "other": "LORA"}
    assert status.num_adapter_layers == 2
    assert status.trainable_params == 2 * (12 + 10) + 2 * (10 + 8)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


def test_what_was_changed_behind_the_model_s_back_is_irregular() -> None:
    model = get_peft_model(mlp(), lora("0", "2"))
    model.base_model.model[0].disable_adapters = True
    model.base_model.model[2].lora_A["default"].weight.requires_grad_(False)
    status = get_model_status(model)
    assert status.enabled == "irregular"
    assert status.requires_grad == {"default": "irregular"}
    model.base_model.model[2].merge()
    assert get_model_status(model).merged_adapters == "irregular"


def test_status_without_a_wrapper_and_without_adapters() -> None:
    assert [layer.name for layer in get_layer_status(inject_adapter_in_model(lora("2"), mlp()))] == ["2"]
    with pytest.raises(ValueError, match="No adapter layers found"):
        get_layer_status(mlp())


def mixed() -> PeftMixedModel:
    model = get_peft_model(mlp(), lora("0", "2"), adapter_name="lora", mixed=True)
    model.add_adapter("ia3", IA3Config(target_modules=["0"], feedforward_modules=[]))
    with torch.no_grad():
        model.base_model.model[0].ia3_l["ia3"].copy_(torch.linspace(0.5, 2, 10)[:, None])
    return model.eval()


def test_methods_compose_in_the_order_they_are_named() -> None:
    model = mixed()
    layer = model.base_model.model[0]
    inner = mlp()[0]
    update = layer.get_delta_weight("lora")
    scale = torch.linspace(0.5, 2, 10)
    model.set_adapter(["lora", "ia3"])
    torch.testing.assert_close(layer(X), inner(X) * scale + X @ update.T)
    model.set_adapter(["ia3", "lora"])
    torch.testing.assert_close(layer(X), (inner(X) + X @ update.T) * scale)
    expected = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


def test_what_a_mixed_model_refuses() -> None:
    model = mixed()
    with pytest.raises(NotImplementedError, match="Saving is not supported for mixed models"):
        model.save_pretrained("anywhere")
    with pytest.raises(ValueError, match="nobody"):
        model.set_adapter(["lora", "nobody"])
    plain = get_peft_model(mlp(), lora("0"))
    with pytest.raises(ValueError, match=r"Cannot combine adapters with different peft types\. Found LORA and IA3"):
        plain.add_adapter("ia3", IA3Config(target_modules=["0"], feedforward_modules=[]))


def test_saved_adapters_of_different_methods_meet(tmp_path: object) -> None:
    get_peft_model(mlp(), lora("0")).save_pretrained(f"{tmp_path}/lora")
    get_peft_model(mlp(), IA3Config(target_modules=["2"], feedforward_modules=[])).save_pretrained(f"{tmp_path}/ia3")
    model = PeftMixedModel.from_pretrained(mlp(), f"{tmp_path}/lora")
    model.load_adapter(f"{tmp_path}/ia3", "ia3")
    model.set_adapter(["default", "ia3"])
    assert isinstance(model, PeftModel)
    assert model.active_adapters == ["default", "ia3"]
    model.delete_adapter("ia3")
    assert model.active_adapters == ["default"]
