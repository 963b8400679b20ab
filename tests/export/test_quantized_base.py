"""After QLoRA: merged into the base as training saw it, the model computes what the quantised base with the adapter does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from data.families import family
from merging.lab import IDS, adapt, load_base, save_base

from peftcli import PeftModel
from peftcli.errors import InputError
from peftcli.export.merged import export_merged

pytest.importorskip("bitsandbytes", reason="needs the quantization extra")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fake_quantize|.*MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

RECIPE = """
model: {{name_or_path: {base}}}
adapter: {{method: lora, r: 4, target_modules: [q_proj, v_proj]}}
quantization: {{{quantization}, bnb_4bit_compute_dtype: float32}}
data: {{train: train.jsonl}}
training: {{output_dir: out}}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": len(family("chatml"))}
    family("chatml").save_pretrained(save_base(tmp_path / "base", **sizes))
    adapt(load_base(tmp_path / "base"), r=4, base_model_name_or_path=str(tmp_path / "base")).save_pretrained(
        tmp_path / "a"
    )
    return tmp_path


def record(place: Path, quantization: str) -> None:
    (place / "a/recipe.yaml").write_text(RECIPE.format(base=place / "base", quantization=quantization))


@pytest.mark.parametrize("double", ["true", "false"])
def test_dequantized(place: Path, double: str) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    record(place, f"load_in_4bit: true, bnb_4bit_use_double_quant: {double}")
    export_merged([place / "a"], place / "base", place / "m", quantized_base="dequantized")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double == "true",
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(place / "base", quantization_config=config)
    adapted = PeftModel.from_pretrained(base, place / "a").eval()
    merged = load_base(place / "m")
    with torch.no_grad():
        expected, found = adapted(IDS).logits, merged(IDS).logits
    original = PeftModel.from_pretrained(load_base(place / "base"), place / "a").eval()
    with torch.no_grad():
        away = (original(IDS).logits - expected).abs().max()
    assert (found - expected).abs().max() < 0.02 * away  # bitsandbytes' CPU kernel rounds scales to bf16


def test_the_choice_must_be_made(place: Path) -> None:
    record(place, "load_in_4bit: true")
    with pytest.raises(InputError, match="--quantized-base"):
        export_merged([place / "a"], place / "base", place / "m")
    export_merged([place / "a"], place / "base", place / "m", quantized_base="original")
    (place / "a/recipe.yaml").unlink()
    shutil.rmtree(place / "m")
    with pytest.raises(InputError, match="how the base was quantised"):
        export_merged([place / "a"], place / "base", place / "m", quantized_base="dequantized")
    assert not (place / "m").exists()
