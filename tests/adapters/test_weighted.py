"""Combinations of adapters: exact sums where they promise one, PEFT's factor space where they don't."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from peftcli import IA3Config, LoraConfig, PeftModel, get_peft_model
from peftcli.adapters.weighted import COMBINATION_TYPES, SVD_TYPES
from tests.adapters.small import X, mlp


def model_with(*configs: LoraConfig) -> PeftModel:
    """Adapters a0, a1, ... with random tensors."""
    model = get_peft_model(mlp(), configs[0], adapter_name="a0")
    for index, config in enumerate(configs[1:], start=1):
        model.add_adapter(f"a{index}", config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def lora(**options: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"], **options})


def delta(model: PeftModel, name: str, module: str = "0") -> torch.Tensor:
    return model.base_model.model.get_submodule(module).get_delta_weight(name)


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize(
    "second",
    [
        lora(),
        lora(use_rslora=True),
        lora(rank_pattern={"0": 2}, alpha_pattern={"2": 1}),
        lora(r=3, target_modules=["0"]),
    ],
    ids=["plain", "rslora", "patterns", "fewer targets"],
)
def test_exact_types_give_the_weighted_sum_of_updates(kind: str, second: LoraConfig) -> None:
    model = model_with(lora(), second)
    model.add_weighted_adapter(["a0", "a1"], [0.7, -1.3], "sum", combination_type=kind, svd_rank=8)
    expected = 0.7 * delta(model, "a0") - 1.3 * delta(model, "a1")
    torch.testing.assert_close(delta(model, "sum"), expected, atol=1e-5, rtol=1e-4)
    only_first = 0.7 * delta(model, "a0", "2") + (0 if second.target_modules == {"0"} else -1.3) * (
        delta(model, "a1", "2") if second.target_modules != {"0"} else 0
    )
    torch.testing.assert_close(delta(model, "sum", "2"), only_first, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_one_parent_of_weight_one_is_itself(kind: str) -> None:
    model = model_with(lora(use_rslora=True))
    model.add_weighted_adapter(["a0"], [1.0], "same", combination_type=kind, density=1.0)
    torch.testing.assert_close(delta(model, "same"), delta(model, "a0"), atol=1e-5, rtol=1e-4)


def test_linear_is_peft_s_factor_sum_with_its_cross_terms() -> None:
    model = model_with(lora(), lora(lora_alpha=2))
    model.add_weighted_adapter(["a0", "a1"], [0.5, -0.25], "sum", combination_type="linear")
    layer = model.base_model.model[0]
    p = {name: layer.tensors(name) for name in ("a0", "a1", "sum")}
    s0, s1 = math.sqrt(0.5 * 6 / 4), math.sqrt(0.25 * 2 / 4)
    torch.testing.assert_close(p["sum"].lora_A, s0 * p["a0"].lora_A - s1 * p["a1"].lora_A)
    torch.testing.assert_close(p["sum"].lora_B, s0 * p["a0"].lora_B + s1 * p["a1"].lora_B)


@pytest.mark.parametrize("kind", sorted(SVD_TYPES))
def test_svd_types_take_dora_s_whole_update(kind: str) -> None:
    model = model_with(lora(use_dora=True), lora(use_dora=True))
    with pytest.raises(ValueError, match="magnitudes"):
        model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "cat", combination_type="cat")
    model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "all", combination_type=kind, density=1.0, svd_rank=12)
    if kind in ("svd", "dare_linear_svd", "magnitude_prune_svd"):
        torch.testing.assert_close(delta(model, "all"), delta(model, "a0") + delta(model, "a1"), atol=1e-5, rtol=1e-4)


def test_the_new_adapter_is_frozen_saved_and_loaded(tmp_path: Path) -> None:
    model = model_with(lora(), lora(r=2, lora_alpha=5, use_rslora=True))
    model.add_weighted_adapter(["a0", "a1"], [1.0, 2.0], "sum", combination_type="cat")
    assert model.active_adapters == ["a0"]
    assert not [n for n, p in model.named_parameters() if ".sum" in n and p.requires_grad]
    model.set_adapter("sum")
    expected = model(X)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.testing.assert_close(PeftModel.from_pretrained(mlp(), tmp_path / "sum")(X), expected)


def test_clamped_factors_stay_inside_their_quantile() -> None:
    model = model_with(lora(), lora())
    model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "sum", combination_type="svd", svd_clamp=0.9)
    p = model.base_model.model[0].tensors("sum")
    assert p.lora_A.abs().max() == p.lora_B.abs().max()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adapters": ["a0", "nobody"]}, "Adapter nobody does not exist"),
        ({"combination_type": "average"}, "Invalid combination_type: average"),
        ({"weights": [1.0]}, "as many weights"),
        ({"combination_type": "ties"}, "needs a density"),
        ({"combination_type": "linear"}, "same r value"),
        ({"combination_type": "ties", "density": 2.0}, "Density"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict, words: str) -> None:
    model = model_with(lora(), lora(r=2))
    if options.get("density"):
        model = model_with(lora(), lora())
    arguments = {"adapters": ["a0", "a1"], "weights": [1.0, 1.0], "adapter_name": "new", **options}
    with pytest.raises(ValueError, match=words):
        model.add_weighted_adapter(**arguments)
    assert "new" not in model.peft_config


def test_ia3_vectors_are_summed() -> None:
    config = {"target_modules": ["0", "2"], "feedforward_modules": ["2"]}
    model = get_peft_model(mlp(), IA3Config(**config), adapter_name="a0")
    model.add_adapter("a1", IA3Config(**config))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                parameter.copy_(torch.randn_like(parameter))
    model.add_weighted_adapter(["a0", "a1"], [0.25, 0.75], "sum")
    layer = model.base_model.model[2]
    expected = 0.25 * layer.ia3_l["a0"] + 0.75 * layer.ia3_l["a1"]
    torch.testing.assert_close(layer.ia3_l["sum"], expected)


def test_a_small_rank_of_one_module_does_not_bound_the_sum_there() -> None:
    pattern = {"rank_pattern": {"0": 1}, "init_lora_weights": False}
    model = model_with(*[LoraConfig(r=3, target_modules=["0"], **pattern) for _ in range(3)])
    layer = model.base_model.model[0]
    wanted = sum(layer.get_delta_weight(f"a{index}") for index in range(3))
    model.add_weighted_adapter(["a0", "a1", "a2"], [1.0, 1.0, 1.0], "sum", combination_type="svd")
    torch.testing.assert_close(layer.get_delta_weight("sum"), wanted)


def test_nothing_and_mixtures_of_targets_are_not_combined() -> None:
    listed, written = LoraConfig(r=2, target_modules=["0"]), LoraConfig(r=2, target_modules="0|2")
    model = model_with(listed, written, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="no adapters to combine"):
        model.add_weighted_adapter([], [], "none")
    with pytest.raises(ValueError, match="being a mix of list/set and string is not supported"):
        model.add_weighted_adapter(["a0", "a1", "a2"], [1.0, 1.0, 1.0], "sum", combination_type="cat")
