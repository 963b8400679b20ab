"""The GGUF adapter read back with gguf's own reader; order and chat template against transformers'."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.families import family
from gguf_files import BASES, linear_modules
from gguf_files import save_base as save_base_of
from merging.lab import deltas, save_adapter, save_base

from peftcli.errors import InputError, RunError
from peftcli.export import gguf as writer
from peftcli.export.gguf import ARCHITECTURES, export_gguf
from peftcli.export.modelfile import find_turns
from peftcli.export.verify_gguf import verify_gguf
from peftcli.merging.algebra import Rank

gguf = pytest.importorskip("gguf")

MODULES = {
    "model.layers.1.self_attn.q_proj": "blk.1.attn_q.weight",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v.weight",
    "model.layers.1.mlp.down_proj": "blk.1.ffn_down.weight",
    "model.embed_tokens": "token_embd.weight",
    "lm_head": "output.weight",
}
HEADS = {"attn_q": 4, "attn_k": 2}


def read(path: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.from_numpy(np.array(tensor.data)).float() for tensor in reader.tensors}


def update_in_transformers_order(name: str, fields: dict, tensors: dict) -> torch.Tensor:
    """What llama.cpp adds to a weight, [out, in], rows put back by transformers' own code for GGUF bases."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    if name == "token_embd.weight":
        a = a.T
    scale = fields["adapter.lora.alpha"] / b.shape[1]
    delta = scale * (b @ a)
    for part, heads in HEADS.items():
        if part in name and fields["general.architecture"] == "llama":
            processor = LlamaTensorProcessor({})
            delta = torch.from_numpy(processor._reverse_permute_weights(delta.numpy(), 4, heads))
    return delta


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}]
)
def test_round_trip(tmp_path: Path, fields: dict) -> None:
    base = save_base(tmp_path / "base", head_dim=4)
    targets = ["q_proj", "k_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"]
    save_adapter(tmp_path / "a", base, r=4, lora_alpha=8, target_modules=targets, **fields)
    export_gguf(tmp_path / "a", base, tmp_path / "g")
    stored, tensors = read(tmp_path / "g/adapter.gguf")
    assert (stored["general.type"], stored["adapter.type"], stored["general.architecture"]) == (
        "adapter",
        "lora",
        "llama",
    )
    assert len(tensors) == 2 * (2 * 4 + 2)
    wanted = deltas(base, tmp_path / "a")
    for module, name in MODULES.items():
        found = update_in_transformers_order(name, stored, tensors)
        torch.testing.assert_close(found, wanted[module], atol=1e-5, rtol=0)


def test_other_methods_and_float16(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "a", base, "LOHA", r=2)
    export_gguf(tmp_path / "a", base, tmp_path / "g", rank=Rank(number=4), dtype="float16")
    stored, tensors = read(tmp_path / "g/adapter.gguf")
    assert stored["adapter.lora.alpha"] == 4
    found = update_in_transformers_order("blk.0.attn_q.weight", stored, tensors)
    wanted = deltas(base, tmp_path / "a")["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0)


EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    ("method", "fields", "dtype", "bound"),
    [
        ("LORA", {"use_rslora": True, "target_modules": EVERYTHING}, None, 1e-6),
        ("LORA", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}, "float16", 3e-3),
        ("LORA", {"use_dora": True}, None, 1e-5),
        ("LOHA", {}, None, 1e-5),
    ],
)
def test_verified(tmp_path: Path, method: str, fields: dict, dtype: str | None, bound: float) -> None:
    base = save_base(tmp_path / "base", head_dim=4)
    save_adapter(tmp_path / "a", base, method, r=4, **{"target_modules": ["q_proj", "k_proj"], **fields})
    full = Rank(number=16) if method == "LOHA" or "use_dora" in fields else None
    made = export_gguf(tmp_path / "a", base, tmp_path / "g", rank=full, dtype=dtype)
    verdict = verify_gguf(tmp_path / "g/adapter.gguf", tmp_path / "a", base, is_exact=made.is_exact)
    assert made.is_exact
    assert verdict.modules == made.modules
    assert verdict.difference < bound


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture(tmp_path: Path, kind: str) -> None:
    base = save_base_of(tmp_path / "base", kind)
    save_adapter(tmp_path / "a", base, r=4, use_rslora=True, target_modules=linear_modules(kind))
    made = export_gguf(tmp_path / "a", base, tmp_path / "g")
    verdict = verify_gguf(tmp_path / "g/adapter.gguf", tmp_path / "a", base, is_exact=made.is_exact)
    assert verdict.modules == made.modules >= len(linear_modules(kind))
    assert verdict.difference < 1e-6


def test_every_architecture_is_run_in_llama_cpp() -> None:
    assert BASES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("permuted", lambda rows, heads: rows),
        ("padded", lambda pair, rank: type(pair)(pair.a, 1.01 * pair.b)),
        ("padded", lambda pair, rank: type(pair)(pair.a * float("nan"), pair.b)),
    ],
)
def test_a_wrong_file_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wrong: object) -> None:
    base = save_base(tmp_path / "base", head_dim=4)
    save_adapter(tmp_path / "a", base, r=4)
    monkeypatch.setattr(writer, name, wrong)
    export_gguf(tmp_path / "a", base, tmp_path / "g")
    with pytest.raises(RunError, match="above the bound"):
        verify_gguf(tmp_path / "g/adapter.gguf", tmp_path / "a", base, is_exact=True)


def test_another_adapters_file_is_seen(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", head_dim=4)
    save_adapter(tmp_path / "a", base, r=4)
    save_adapter(tmp_path / "b", base, r=4, target_modules=["q_proj"])
    export_gguf(tmp_path / "b", base, tmp_path / "g")
    with pytest.raises(RunError, match="v_proj"):
        verify_gguf(tmp_path / "g/adapter.gguf", tmp_path / "a", base, is_exact=True)


@pytest.mark.parametrize(
    ("base_fields", "fields", "problem"),
    [
        ({"tie_word_embeddings": True}, {"target_modules": ["lm_head"]}, "lm_head is one matrix with the embedding"),
        ({"tie_word_embeddings": True}, {"target_modules": ["embed_tokens"]}, "embed_tokens is one matrix with"),
        ({}, {"modules_to_save": ["lm_head"]}, "trained in full"),
    ],
)
def test_refusals(tmp_path: Path, base_fields: dict, fields: dict, problem: str) -> None:
    base = save_base(tmp_path / "base", **base_fields)
    save_adapter(tmp_path / "a", base, r=2, **fields)
    with pytest.raises(InputError, match=problem):
        export_gguf(tmp_path / "a", base, tmp_path / "g")
    assert not (tmp_path / "g").exists()


def test_unknown_layouts_are_refused(shared: Path, tmp_path: Path) -> None:
    golden = shared / "golden"
    with pytest.raises(InputError, match="gpt2"):
        export_gguf(golden / "peft-0.13.0/gpt2_lora/adapter", golden / "bases/gpt2_a", tmp_path / "g")


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
def test_turns_render_as_the_template(name: str) -> None:
    tokenizer = family(name)
    turns = find_turns(tokenizer)
    assert turns is not None
    talk = [{"role": role, "content": f"text {i}"} for i, role in enumerate(["user", "assistant", "user"])]
    wanted = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert turns.render(talk) == (wanted.removeprefix(tokenizer.bos_token) if adds_bos else wanted)


def test_a_bos_that_only_the_template_writes_stays() -> None:
    """SmolLM2's is <|im_start|>, and its tokenizer does not add it."""
    tokenizer = copy.deepcopy(family("chatml"))
    tokenizer.bos_token = "<|im_start|>"
    assert tokenizer("a").input_ids[0] != tokenizer.bos_token_id
    turns = find_turns(tokenizer)
    assert turns is not None and turns.before_user.startswith("<|im_start|>user")


DEFAULT = "<|im_start|>system\nYou are helpful.<|im_end|>\n"


def with_start(start: str) -> Any:
    tokenizer = copy.deepcopy(family("chatml"))
    tokenizer.chat_template = f"{{% if {start} %}}{DEFAULT}{{% endif %}}{tokenizer.chat_template}"
    return tokenizer


def test_a_system_message_of_the_templates_own() -> None:
    turns = find_turns(with_start("messages[0].role != 'system'"))
    assert turns is not None
    assert (turns.default, turns.after_answer.strip()) == (DEFAULT, "<|im_end|>")
    assert turns.go().startswith('{{- if ne (index .Messages 0).Role "system" }}' + DEFAULT + "{{ end }}")


def test_a_template_that_does_more_is_left_out() -> None:
    assert find_turns(with_start("messages|length > 3")) is None


def test_modelfile(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", vocab_size=len(family("chatml")))
    family("chatml").save_pretrained(base)
    save_adapter(tmp_path / "a", base, r=2)
    export_gguf(tmp_path / "a", base, tmp_path / "g")
    text = (tmp_path / "g/Modelfile").read_text()
    assert text.startswith(f'FROM {base}\nADAPTER ./adapter.gguf\nTEMPLATE """')
    assert "<|im_start|>user\n{{ .Content }}<|im_end|>" in text
    assert 'PARAMETER stop "<|im_end|>"' in text
