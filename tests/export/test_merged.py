"""A merged model folder computes what base + adapter compute, for every mergeable golden case and every kind of tie."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from golden import Golden, find, forward
from merging.lab import IDS, load, load_base, logits, save_adapter, save_base
from safetensors.torch import load_file

from peftcli import PeftModel, get_peft_model
from peftcli.adapters.config import read_config
from peftcli.errors import InputError
from peftcli.export.merged import export_merged

SHARED = Path(os.environ.get("PEFTCLI_SHARED", Path(__file__).parents[3] / "shared")).resolve()
CASES = find(SHARED) or {"none": None}

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
    pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed"),
]


@pytest.mark.parametrize("name", list(CASES))
def test_golden(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case: Golden | None = CASES[name]
    if case is None:
        pytest.skip(f"no golden adapters at {SHARED}")
    monkeypatch.chdir(case.folder)  # X-LoRA's config names its experts from there
    try:
        read_config(case.adapter / "adapter_config.json")
    except InputError:
        pytest.skip("a method or variant we do not have")
    base = case.folder.parents[1] / "bases" / case.facts["base"]
    try:
        export_merged([case.adapter], base, tmp_path / "m")
    except InputError as error:
        assert re.search("merge", str(error))
        assert case.facts["trust"]["merge"] != "ok" or "the order of the model's modules" in str(error)
        return
    model = PeftModel.from_pretrained(case.base(), case.adapter, allow_pickle=True).eval()
    auto = getattr(transformers, case.facts["auto_class"])
    merged = auto.from_pretrained(tmp_path / "m", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(forward(merged, case.inputs()), forward(model, case.inputs()), atol=1e-4, rtol=0)


def merged_equals_adapted(base: Path, adapter: Path, out: Path, **options: object) -> None:
    export_merged([adapter], base, out, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(logits(load_base(out)), logits(load(base, adapter)), atol=2e-5, rtol=0)


TIED = {
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
    "tokens and head": {"target_modules": ["lm_head"], "trainable_token_indices": [3, 7]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "inside": {"target_modules": ["q_proj"]},
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("what", list(TIED))
def test_ties(tmp_path: Path, what: str, tied: bool) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=tied)
    if tied and what == "tokens and head":
        pytest.skip("the engine gives a tied head to the tokens alone")
    save_adapter(tmp_path / "a", base, r=2, **TIED[what])
    merged_equals_adapted(base, tmp_path / "a", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    stays = tied and what in ("tokens", "inside")
    assert config["tie_word_embeddings"] is stays
    assert ("lm_head.weight" in load_file(tmp_path / "m/model.safetensors")) is not stays


def test_biases_and_dora(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", attention_bias=True)
    save_adapter(tmp_path / "a", base, r=2, bias="all", use_dora=True)
    merged_equals_adapted(base, tmp_path / "a", tmp_path / "m")
    save_adapter(tmp_path / "b", base, r=2, lora_bias=True)
    merged_equals_adapted(base, tmp_path / "b", tmp_path / "n")


def test_loftq_replaces_the_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    loftq = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    save_adapter(tmp_path / "a", base, r=2, size=0.01, **loftq)
    merged_equals_adapted(base, tmp_path / "a", tmp_path / "m")


def test_several_adapters(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    for index in range(2):
        save_adapter(tmp_path / f"{index}", base, r=2, seed=index)
    export_merged([tmp_path / "0", tmp_path / "1"], base, tmp_path / "m")
    export_merged([tmp_path / "0"], base, tmp_path / "once")
    export_merged([tmp_path / "1"], tmp_path / "once", tmp_path / "twice")
    torch.testing.assert_close(logits(load_base(tmp_path / "m")), logits(load_base(tmp_path / "twice")))


def test_untouched_bytes_stay(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    save_adapter(tmp_path / "a", base, r=2)
    done = export_merged([tmp_path / "a"], base, tmp_path / "m")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "m/model.safetensors")
    assert list(before) == list(after)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert sorted(changed) == sorted(
        f"model.layers.{i}.self_attn.{m}.weight" for i in (0, 1) for m in ("q_proj", "v_proj")
    )
    assert (done.changed, done.copied) == (4, len(before) - 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    save_adapter(tmp_path / "a", base, r=2)
    export_merged([tmp_path / "a"], base, tmp_path / "m", dtype=dtype)
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "m/model.safetensors").values()} == {f"torch.{dtype}"}
    assert next(load_base(tmp_path / "m").parameters()).dtype == getattr(torch, dtype)


def test_shards(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "a", base, r=2)
    export_merged([tmp_path / "a"], base, tmp_path / "m", shard_size=8_000)
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2
    assert all((tmp_path / "m" / name).stat().st_size < 12_000 for name in files)
    torch.testing.assert_close(logits(load_base(tmp_path / "m")), logits(load(base, tmp_path / "a")))
    merged_equals_adapted(tmp_path / "m", tmp_path / "a", tmp_path / "again")  # a sharded base keeps its files
    assert sorted(path.name for path in (tmp_path / "again").glob("*.safetensors")) == files


def test_grown_vocabulary(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    model = load_base(base)
    model.resize_token_embeddings(52)
    from peftcli import LoraConfig

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=str(base)))
    adapted.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    (tmp_path / "a/tokenizer_config.json").write_text("{}")
    export_merged([tmp_path / "a"], base, tmp_path / "m")
    merged = load_base(tmp_path / "m")
    assert merged.config.vocab_size == 52
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, adapted.eval()(IDS).logits)


def test_replicated_layers_are_written_out(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "a", base, r=2, layer_replication=[[0, 2], [0, 2], [1, 2]])
    merged_equals_adapted(base, tmp_path / "a", tmp_path / "m")
    assert json.loads((tmp_path / "m/config.json").read_text())["num_hidden_layers"] == 5


def test_tokenizer_and_settings_come_along(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "secret.bin"):
        (base / name).write_text("{}")
    save_adapter(tmp_path / "a", base, r=2)
    export_merged([tmp_path / "a"], base, tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        *("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]


def test_refusals(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "a", base, r=2)
    config = json.loads((base / "config.json").read_text())
    quantized = shutil.copytree(base, tmp_path / "quantized")
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(InputError, match="quantised"):
        export_merged([tmp_path / "a"], quantized, tmp_path / "m")
    with pytest.raises(InputError, match="--dtype"):
        export_merged([tmp_path / "a"], base, tmp_path / "m", dtype="int8")
    with pytest.raises(InputError, match="q_proj"):
        export_merged([tmp_path / "a"], save_base(tmp_path / "wide", hidden_size=32), tmp_path / "m")
    with pytest.raises(InputError, match="input"):
        export_merged([tmp_path / "a"], base, base, overwrite=True)
    assert not (tmp_path / "m").exists()
