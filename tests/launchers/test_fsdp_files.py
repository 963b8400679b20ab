"""FSDP files: every one we ship is completed, and what contradicts the recipe is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftcli.errors import InputError
from peftcli.launchers import configs
from peftcli.recipe.schema import Recipe

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}


def recipe(config: str | None = None, quantization: dict[str, Any] | None = None, **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name_or_path": "base"},
            "adapter": {"method": "lora"},
            "quantization": quantization,
            "data": {"train": "train.jsonl"},
            "training": {"output_dir": "out", **training},
            "launcher": {"type": "fsdp", "num_processes": 2, "config": config},
        }
    )


def written(folder: Path, text: str) -> str:
    (folder / "own.yaml").write_text(text, encoding="utf-8")
    return str(folder / "own.yaml")


@pytest.mark.parametrize("name", sorted(path.stem for path in (configs.CONFIGS / "fsdp").glob("*.yaml")))
def test_ours_are_completed(name: str) -> None:
    found = configs.resolve(recipe(name, NF4, gradient_checkpointing=True, bf16=True), 2)
    assert found == {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": None,
        "fsdp_reshard_after_forward": True,
        "fsdp_offload_params": name == "fsdp-offload",
        "fsdp_activation_checkpointing": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
    }


def test_layers_are_named_as_accelerate_names_them(tmp_path: Path) -> None:
    path = written(tmp_path, "fsdp_config: {fsdp_transformer_layer_cls_to_wrap: 'LlamaDecoderLayer, Other'}")
    assert configs.resolve(recipe(path), 2)["fsdp_transformer_layer_cls_to_wrap"] == ["LlamaDecoderLayer", "Other"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_processes: 4\nfsdp_config: {}", "num_processes: is 4, but the recipe makes it 2"),
        ("mixed_precision: fp16\nfsdp_config: {}", "mixed_precision: is fp16, but the recipe makes it no"),
        ("distributed_type: MULTI_GPU\nfsdp_config: {}", "distributed_type: is MULTI_GPU"),
        ("fsdp_config: {fsdp_activation_checkpointing: true}", "but the recipe makes it False"),
        ("fsdp_config: {fsdp_version: 1}", "fsdp_version: is 1"),
        ("fsdp_config: {fsdp_offload_params: 1}", "fsdp_offload_params: is 1"),
        ("fsdp_config: {fsdp_offload: true}", "fsdp_offload: is not known here"),
        ("fsdp_config: {fsdp_transformer_layer_cls_to_wrap: 3}", "fsdp_transformer_layer_cls_to_wrap: is 3"),
        ("fsdp_config: 3", "has no section fsdp_config"),
    ],
)
def test_what_does_not_fit_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        configs.resolve(recipe(written(tmp_path, text)), 2)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"load_in_8bit": True}, "8-bit weights can't be sharded"),
        ({"load_in_4bit": True}, "set it to bfloat16, as bnb_4bit_compute_dtype is"),
    ],
)
def test_quantised_weights_that_can_not_be_sharded(quantization: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        configs.resolve(recipe(None, quantization), 2)


def test_one_process_has_nothing_to_share() -> None:
    with pytest.raises(InputError, match="two processes or more"):
        configs.resolve(recipe(), 1)


def test_an_optimizer_that_knows_no_shards() -> None:
    values = recipe(optim="adafactor").model_dump(mode="json")
    assert configs.resolve(Recipe.model_validate(values), 2)  # an adapter is whole
    with pytest.raises(InputError, match="adafactor can't train sharded weights"):
        configs.resolve(Recipe.model_validate({**values, "adapter": {"method": "full"}}), 2)
