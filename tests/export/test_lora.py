"""Adapters written as adapters keep what they compute, and say what they lose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merging.lab import assert_same, deltas, load, load_base, logits, save_adapter, save_base
from safetensors.torch import load_file, save_file

from peftcli import PromptTuningConfig, get_peft_model
from peftcli.adapters.registry import config_class
from peftcli.errors import InputError, RunError
from peftcli.export.lora import export_lora, export_peft
from peftcli.export.merged import export_merged
from peftcli.export.verify import verify
from peftcli.merging.algebra import Rank

OLD_KEYS = {
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r"),
    *("target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("megatron_config", "megatron_core", "loftq_config", "use_dora", "layer_replication"),
}
"""What `LoraConfig` of PEFT 0.13.0 knows; any other key is a TypeError there."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("export") / "base")


PLAIN = {
    "rslora": {"use_rslora": True, "r": 4, "lora_alpha": 8},
    "patterns": {"r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3.5}},
    "embedding": {"r": 2, "target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "expression": {"r": 2, "target_modules": r".*\.1\..*_proj"},
    "excluded": {"r": 2, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "layers": {"r": 2, "layers_to_transform": [1]},
}


@pytest.mark.parametrize("name", list(PLAIN))
def test_portable_gives_the_same_logits(base: Path, tmp_path: Path, name: str) -> None:
    save_adapter(tmp_path / "a", base, **PLAIN[name])
    done = export_lora(tmp_path / "a", tmp_path / "p", portable=True)
    assert done.is_exact
    torch.testing.assert_close(
        logits(load(base, tmp_path / "p")), logits(load(base, tmp_path / "a")), atol=1e-5, rtol=0
    )
    config = json.loads((tmp_path / "p/adapter_config.json").read_text())
    assert set(config) <= OLD_KEYS
    assert config["r"] == config["lora_alpha"]
    assert isinstance(config["lora_alpha"], int)
    assert not (config["rank_pattern"] or config["alpha_pattern"] or config["use_rslora"])
    tensors = load_file(tmp_path / "p/adapter_model.safetensors")
    assert {tensor.shape[0] for key, tensor in tensors.items() if "_A" in key} == {config["r"]}


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("LOHA", {"r": 2}),
        ("LOKR", {"r": 2}),
        ("VERA", {"r": 4}),
        ("LORA", {"use_dora": True}),
        ("OFT", {"oft_block_size": 4}),
    ],
)
def test_any_update_as_lora(base: Path, tmp_path: Path, method: str, fields: dict) -> None:
    save_adapter(tmp_path / "a", base, method, **fields)
    full = export_lora(tmp_path / "a", tmp_path / "full", portable=False, rank=Rank(number=16), base=base)
    assert_same(deltas(base, tmp_path / "full"), deltas(base, tmp_path / "a"), atol=1e-5)
    assert full.is_exact
    part = export_lora(tmp_path / "a", tmp_path / "part", portable=False, rank=Rank(energy=0.7), base=base)
    assert 0.7 <= part.energy < 1
    exact, cut = deltas(base, tmp_path / "a"), deltas(base, tmp_path / "part")
    lost = sum(float(((exact[name] - cut[name]) ** 2).sum()) for name in exact)
    assert 1 - lost / sum(float((exact[name] ** 2).sum()) for name in exact) == pytest.approx(part.energy, abs=1e-4)


def test_modules_trained_in_full_stay(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", base, "LOHA", r=1, modules_to_save=["lm_head"])
    export_lora(tmp_path / "a", tmp_path / "l", portable=False, rank=Rank(number=16))
    torch.testing.assert_close(
        logits(load(base, tmp_path / "l")), logits(load(base, tmp_path / "a")), atol=1e-4, rtol=0
    )
    with pytest.raises(InputError, match=r"lm_head\.weight is trained in full"):
        export_lora(tmp_path / "a", tmp_path / "p", portable=True, rank=Rank(number=16))


@pytest.mark.parametrize(
    ("method", "fields", "problem"),
    [
        ("LORA", {"use_dora": True}, "--base"),
        ("LORA", {"lora_bias": True}, "lora_bias"),
        ("LORA", {"trainable_token_indices": [3]}, "trainable tokens"),
        ("LN_TUNING", {"target_modules": ["input_layernorm"]}, "no update"),
    ],
)
def test_refusals(tmp_path: Path, method: str, fields: dict, problem: str) -> None:
    root = save_base(tmp_path / "base", attention_bias=True)
    save_adapter(tmp_path / "a", root, method, **fields)
    with pytest.raises(InputError, match=problem):
        export_lora(tmp_path / "a", tmp_path / "p", portable=True)
    assert not (tmp_path / "p").exists()


def test_prompts_are_no_lora(base: Path, tmp_path: Path) -> None:
    get_peft_model(load_base(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(InputError, match="prompt"):
        export_lora(tmp_path / "a", tmp_path / "p", portable=True)
    export_peft(tmp_path / "a", tmp_path / "c")
    assert load_file(tmp_path / "c/adapter_model.safetensors").keys() == {"prompt_embeddings"}


def test_clean_copy(base: Path, tmp_path: Path) -> None:
    """A `.bin` is read without unpickling; optimizer states and the like stay behind."""
    save_adapter(tmp_path / "a", base, r=2)
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    torch.save(tensors, tmp_path / "a/adapter_model.bin")
    (tmp_path / "a/adapter_model.safetensors").unlink()
    for name in ("optimizer.pt", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "a" / name).write_text("{}")
    export_peft(tmp_path / "a", tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    copied = load_file(tmp_path / "c/adapter_model.safetensors")
    assert copied.keys() == tensors.keys()
    assert all(torch.equal(copied[key], tensors[key]) for key in tensors)


def test_verify_sees_a_wrong_result(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", base, r=2)
    export_merged([tmp_path / "a"], base, tmp_path / "m")
    export_lora(tmp_path / "a", tmp_path / "p", portable=True)
    for result, is_model in (("m", True), ("p", False)):
        verdict = verify(base, [tmp_path / "a"], tmp_path / result, is_model=is_model, is_exact=True)
        assert verdict.bound is not None
        assert verdict.difference < verdict.bound / 10
    for result, name in (("m", "model.safetensors"), ("p", "adapter_model.safetensors")):
        tensors = load_file(tmp_path / result / name)
        key = next(key for key in tensors if "q_proj" in key)
        save_file({**tensors, key: -tensors[key]}, tmp_path / result / name, metadata={"format": "pt"})
        with pytest.raises(RunError, match="logits differ by"):
            verify(base, [tmp_path / "a"], tmp_path / result, is_model=result == "m", is_exact=True)


def test_verify_several_adapters(base: Path, tmp_path: Path) -> None:
    adapters = [save_adapter(tmp_path / f"{index}", base, r=2, seed=index) for index in range(2)]
    export_merged(adapters, base, tmp_path / "m")
    verdict = verify(base, adapters, tmp_path / "m", is_model=True, is_exact=True)
    assert verdict.difference < 1e-4


def test_an_adapted_embedding_stored_beside_its_adapter_is_no_module_trained_in_full(
    base: Path, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "a", base, target_modules=["embed_tokens", "q_proj"])
    stored = load_file(tmp_path / "a/adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in stored  # as PEFT's "auto" does
    export_lora(tmp_path / "a", tmp_path / "portable", portable=True)
    assert not any("base_layer" in key for key in load_file(tmp_path / "portable/adapter_model.safetensors"))
    verify(base, [tmp_path / "a"], tmp_path / "portable", is_model=False, is_exact=True)
    export_merged([tmp_path / "a"], base, tmp_path / "merged")
    verify(base, [tmp_path / "a"], tmp_path / "merged", is_model=True, is_exact=True)


def test_what_changes_a_missing_bias_is_no_lora(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", base, "BEFT", init_weights=False)
    with pytest.raises(InputError, match="changes the bias"):
        export_lora(tmp_path / "a", tmp_path / "l", portable=False, base=base)


@pytest.mark.parametrize(
    ("method", "fields"), [("PREFIX_TUNING", {"num_virtual_tokens": 5}), ("POLY", {"n_tasks": 2, "r": 2})]
)
def test_verify_makes_room_for_prompts_and_names_a_task(base: Path, tmp_path: Path, method: str, fields: dict) -> None:
    model = load_base(base)
    short = save_base(tmp_path / "short", max_position_embeddings=24)
    config = {"target_modules": ["q_proj"]} if method == "POLY" else {}
    get_peft_model(model, config_class(method)(task_type="CAUSAL_LM", **fields, **config)).save_pretrained(
        tmp_path / "a"
    )
    export_peft(tmp_path / "a", tmp_path / "copy")
    verdict = verify(short, [tmp_path / "a"], tmp_path / "copy", is_model=False, is_exact=True)
    assert verdict.difference == 0
    assert verdict.tokens == 24 - fields.get("num_virtual_tokens", 0)


def test_numbers_too_large_are_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", base, r=2, lora_alpha=1e38)
    path = tmp_path / "a/adapter_model.safetensors"
    save_file({key: tensor * 1e6 for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    for write in (
        lambda: export_lora(tmp_path / "a", tmp_path / "p", portable=True),
        lambda: export_merged([tmp_path / "a"], base, tmp_path / "p"),
    ):
        with pytest.raises(InputError, match=r"too large for 32 bits|would hold NaN or infinity"):
            write()
    assert not (tmp_path / "p").exists()


def test_a_name_no_file_system_takes(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", base, r=2)
    with pytest.raises(InputError, match="too long a name"):
        export_peft(tmp_path / "a", tmp_path / ("a" * 250))
