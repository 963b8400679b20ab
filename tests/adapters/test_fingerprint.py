"""An adapter knows its base: another one is refused by name, the same one in another precision or size is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training.tiny import tiny_llama

from peftcli import LoraConfig, PeftModel, get_peft_model
from peftcli.adapters.fingerprint import FILE
from peftcli.errors import InputError
from peftcli.export.merged import export_merged


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base = tiny_llama()
    base.config.name_or_path = "/home/someone/secret/tiny"
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_same_base_is_taken_however_it_is_loaded(adapter: Path) -> None:
    grown = tiny_llama()
    grown.resize_token_embeddings(101)
    for base in (tiny_llama(), tiny_llama().to(torch.bfloat16), tiny_llama().to(torch.float16), grown):
        PeftModel.from_pretrained(base, adapter)
    model = PeftModel.from_pretrained(tiny_llama(), adapter)
    model.load_adapter(adapter, "second")  # the first adapter is no part of the base


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "other weights": ({"seed": 1}, "same shapes, but other weights"),
    "more layers": ({"num_hidden_layers": 3}, "its num_hidden_layers was 2, this one's is 3"),
    "other heads": ({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}, "num_attention_heads was 2"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_base_is_refused_by_name(kind: str, adapter: Path) -> None:
    changes, says = OTHERS[kind]
    base = tiny_llama(**changes)
    with pytest.raises(InputError, match=r"trained on another base \(tiny\)") as refused:
        PeftModel.from_pretrained(base, adapter)
    assert says in str(refused.value)
    assert FILE in str(refused.value)
    assert not any("lora" in name for name, _ in base.named_parameters())
    (adapter / FILE).unlink()  # as the message says
    if kind == "other weights":
        PeftModel.from_pretrained(base, adapter)


def test_merging_into_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        tiny_llama(seed).save_pretrained(tmp_path / f"base{seed}")
    export_merged([adapter], tmp_path / "base0", tmp_path / "good")
    with pytest.raises(InputError, match="same shapes, but other weights"):
        export_merged([adapter], tmp_path / "base1", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_the_file_says_nothing_of_the_machine(adapter: Path) -> None:
    assert "secret" not in (adapter / FILE).read_text()


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"format": 1, "config": 3}', '{"format": 1, "config": {"model_type": [1]}}']
)
def test_a_broken_file_is_refused_or_tells_nothing(text: str, adapter: Path) -> None:
    (adapter / FILE).write_text(text)
    try:
        PeftModel.from_pretrained(tiny_llama(), adapter)
    except InputError as refused:
        assert FILE in str(refused)


def test_a_later_format_is_left_to_later_versions(adapter: Path) -> None:
    values = json.loads((adapter / FILE).read_text())
    (adapter / FILE).write_text(json.dumps({**values, "format": 2, "embeddings": "0"}))
    PeftModel.from_pretrained(tiny_llama(), adapter)
