"""Adapter folders that are wrong in one way each: the audit names the file, the tensor and what is wrong."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_files import PATH, Tensor, filled, floats, lora_tensors, safetensors, write_adapter, write_base

from peftcli.adapters.audit import Audit, audit_folder
from peftcli.adapters.registry import METHODS
from peftcli.errors import InputError

SHARED = Path(os.environ.get("PEFTCLI_SHARED", Path(__file__).parents[3] / "shared")).resolve()
GOLDEN = {str(path.parent.relative_to(SHARED / "golden")): path for path in SHARED.glob("golden/peft-*/*/case.json")}

Q, V = (PATH.format(layer=0, module=module, name="lora_{}.weight") for module in ("q_proj", "v_proj"))
A, B = Q.format("A"), Q.format("B")


def audit(folder: Path, **arguments: Any) -> Audit:
    return audit_folder(folder, **arguments)


def errors(folder: Path, **arguments: Any) -> str:
    return "\n".join(map(str, audit(folder, **arguments).errors))


def doubts(folder: Path, **arguments: Any) -> str:
    return "\n".join(map(str, audit(folder, **arguments).doubts))


def renamed(change: Callable[[str], str]) -> dict[str, Tensor]:
    return {change(name): tensor for name, tensor in lora_tensors().items()}


def test_a_good_adapter(tmp_path: Path) -> None:
    found = audit(write_adapter(tmp_path))
    assert (found.errors, found.doubts) == ([], [])
    fit = found.modules["model.layers.1.self_attn.v_proj"]
    assert (fit.shape.kind, fit.shape.in_features, fit.shape.out_features, fit.adapter.scaling) == (
        "linear",
        16,
        8,
        2.0,
    )


def test_a_good_adapter_beside_its_base(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    found = audit(write_adapter(tmp_path / "adapter", base_model_name_or_path="../base"))
    assert found.base is not None
    assert (found.errors, found.doubts) == ([], [])


WRONG_TENSORS: dict[str, tuple[dict[str, Tensor | None], list[str]]] = {
    "rank of one factor": ({B: floats(16, 2)}, [B, "r is 4 in the config, 2 in lora_B.weight"]),
    "transposed": ({A: floats(16, 4)}, [A]),
    "three dimensions": ({A: floats(1, 4, 16)}, [A, "is [1, 4, 16], not [4, any]"]),
    "a single number": ({A: floats()}, [A, "[]"]),
    "a size that differs from its partner": ({V.format("B"): None}, [V.format("B"), "is missing"]),
    "no rows": ({A: ("F32", (0, 16), b"")}, [A, "is empty", "r is 4"]),
    "whole numbers": ({A: ("I8", (4, 16), bytes(64))}, [A, "I8", "floats are meant"]),
    "truth values": ({A: ("BOOL", (4, 16), bytes(64))}, [A, "BOOL"]),
    "NaN": ({A: ("F32", (4, 16), struct.pack("<64f", float("nan"), *[1.0] * 63))}, [A, "NaN or infinite"]),
    "infinity": ({B: ("BF16", (16, 4), b"\x80\x7f" + bytes(126))}, [B, "NaN or infinite"]),
    "a factor with no partner": ({B: None}, [B, "is missing"]),
    "a stray tensor": ({"base_model.model.x.weight": floats(2)}, ["base_model.model.x.weight", "is no tensor of LORA"]),
    "an unknown part": ({A.replace("lora_A", "lora_C"): floats(2, 2)}, ["lora_C.weight", "is no tensor of LORA"]),
    "a part of another kind": ({A.replace("lora_A.weight", "lora_embedding_A"): floats(4, 9)}, ["lora_embedding_A"]),
    "a module that is no target": ({A.replace("q_proj", "k_proj"): floats(4, 16)}, ["k_proj", "`target_modules`"]),
    "a look-alike letter": ({A.replace("q_proj", "q_pr\u043ej"): floats(4, 16)}, ["q_pr\\u043ej", "characters"]),
    "escape codes": ({"base_model.model.\x1b[31m.weight": floats(2)}, ["\\x1b[31m", "characters"]),
    "the same tensor twice": ({A.replace(".weight", ".default.weight"): floats(4, 16)}, ["the same tensor"]),
}


@pytest.mark.parametrize(("changes", "says"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_wrong_tensors(changes: dict[str, Tensor | None], says: list[str], tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in (lora_tensors() | changes).items() if tensor is not None}
    text = errors(write_adapter(tmp_path, tensors))
    assert "adapter_model.safetensors" in text
    for part in says:
        assert part in text
    assert "\x1b" not in text


WRONG_NAMES: dict[str, tuple[Callable[[str], str], str]] = {
    "no prefix": (lambda name: name.removeprefix("base_model.model."), "lacks the prefix `base_model.model.`"),
    "two prefixes": (lambda name: f"base_model.model.{name}", "carries the prefix `base_model.model.` more than once"),
    "half a prefix": (lambda name: name.removeprefix("base_model."), "lacks the prefix"),
    "adapter's name": (lambda name: name.replace(".weight", ".default.weight"), "adapter's name `.default.`"),
    "another name": (lambda name: name.replace(".weight", ".mine.weight"), "adapter's name `.mine.`"),
    "DDP": (lambda name: f"module.{name}", "`module.`"),
    "DDP inside": (lambda name: name.replace("base_model.model.", "base_model.model.module."), "`module.`"),
    "FSDP": (lambda name: name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"), "`_fsdp_wrapped_module.`"),
    "compiled": (lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."), "torch.compile"),
}


@pytest.mark.parametrize(("change", "says"), WRONG_NAMES.values(), ids=WRONG_NAMES)
def test_wrong_names_are_one_error(change: Callable[[str], str], says: str, tmp_path: Path) -> None:
    found = audit(write_adapter(tmp_path, renamed(change)))
    (error,) = found.errors
    assert says in str(error)
    assert "(and 7 more)" in str(error)


WRONG_CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "rank": ({"r": 8}, ["r is 8 in the config, 4 in lora_A.weight", "q_proj"]),
    "rank_pattern lies": ({"rank_pattern": {"q_proj": 2}}, ["r is 2 in the config, 4", "q_proj"]),
    "targets": ({"target_modules": ["nothing"]}, ["`target_modules` does not name: nothing"]),
    "an expression": ({"target_modules": r".*\.q_proj"}, ["v_proj", "`target_modules`"]),
    "excluded": ({"exclude_modules": ["v_proj"]}, ["v_proj", "`exclude_modules`"]),
    "layers": ({"layers_to_transform": [99]}, ["layer 0", "`layers_to_transform` is [99]"]),
    "a head that is missing": ({"modules_to_save": ["lm_head"]}, ["lm_head", "has no tensors"]),
    "an empty range of layers": ({"layer_replication": [[2, 1]]}, ["`layer_replication` names the layers 2 to 1"]),
    "more layers than tensors": ({"layer_replication": [[0, 2], [0, 2]]}, ["builds 4 layers, but 2"]),
    "endless layers": ({"layer_replication": [[0, 10**9]]}, ["builds 1,000,000,000 layers"]),
    "a parameter with no tensors": ({"target_parameters": ["experts.w"]}, ["experts.w", "`target_parameters`"]),
    "PiSSA, not converted": ({"init_lora_weights": "pissa"}, ["pissa", "without conversion"]),
    "exponential exclusion": ({"exclude_modules": "(([a-z_.0-9])+)+X"}, ["exclude_modules", "exponential", "config"]),
    "exponential rank_pattern": ({"rank_pattern": {"(([a-z_.0-9])+)+X": 2}}, ["rank_pattern", "exponential"]),
}


@pytest.mark.parametrize(("changes", "says"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_configs_that_do_not_fit(changes: dict[str, Any], says: list[str], tmp_path: Path) -> None:
    text = errors(write_adapter(tmp_path, **changes))
    for part in says:
        assert part in text


@pytest.mark.parametrize("name", ["good\0base", "--trust-remote-code", "~/.ssh", "a" * 5000])
def test_hostile_base_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="base_model_name_or_path"):
        audit(write_adapter(tmp_path, base_model_name_or_path=name))


FINE_CONFIGS: dict[str, dict[str, Any]] = {
    "no targets": {"target_modules": None},
    "all-linear": {"target_modules": "all-linear"},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3}},
    "rank by full name": {"r": 9, "rank_pattern": {"self_attn.q_proj": 4, r".*v_proj": 4}},
    "biases that the base lacks": {"bias": "lora_only"},
    "Conv1D, wrongly": {"fan_in_fan_out": True},
    "a base that is nowhere": {"base_model_name_or_path": "meta\u202ellama\u200b/x"},
    "replicated layers": {"layer_replication": [[0, 1], [0, 1]]},
    "no base": {"base_model_name_or_path": None},
    "a field of the future that says nothing": {"new_field": None},
}


@pytest.mark.parametrize("changes", FINE_CONFIGS.values(), ids=FINE_CONFIGS)
def test_configs_that_fit(changes: dict[str, Any], tmp_path: Path) -> None:
    assert errors(write_adapter(tmp_path, **changes)) == ""


def test_the_base_decides(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    wide = write_base(tmp_path / "wide", hidden=32)
    assert "is [4, 16], not [4, 32]" in errors(adapter, base=wide)
    deep = write_base(tmp_path / "deep", layers=3)
    assert "layers.2.self_attn.q_proj" in errors(adapter, base=deep)
    assert "no tensors in the file" in errors(adapter, base=deep)
    shallow = write_base(tmp_path / "shallow", layers=1)
    assert "is no module of the base" in doubts(adapter, base=shallow)


def test_layers_that_are_left_out_on_purpose(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", layers=3)
    adapter = write_adapter(tmp_path / "adapter", layers_to_transform=[0, 1])
    assert errors(adapter, base=base) == ""


def test_a_bigger_vocabulary(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    tensors = lora_tensors() | {"base_model.model.lm_head.weight": floats(12, 16)}
    adapter = write_adapter(tmp_path / "adapter", tensors, modules_to_save=["lm_head"])
    assert "lm_head.weight: is [12, 16], but [10, 16] in the base" in errors(adapter, base=base)
    (adapter / "tokenizer_config.json").write_text("{}")
    assert errors(adapter, base=base) == ""
    assert "must be resized" in doubts(adapter, base=base)


def test_a_base_that_is_broken_is_a_doubt_unless_it_was_named(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"")
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))
    assert errors(adapter) == ""
    assert "can't be read" in doubts(adapter)
    with pytest.raises(InputError, match="is empty"):
        audit(adapter, base=base)


def test_an_index_may_not_leave_its_folder(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(InputError, match="no plain file name"):
        audit(write_adapter(tmp_path / "adapter"), base=base)


def test_sharded_and_transposed_bases(tmp_path: Path) -> None:
    base = tmp_path / "gpt2"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (base / "one.safetensors").write_bytes(safetensors({"h.0.attn.c_attn.weight": floats(16, 48)}))
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "one.safetensors"}}))
    head = "base_model.model.transformer.h.0.attn.c_attn."
    tensors = {head + "lora_A.weight": floats(4, 16), head + "lora_B.weight": floats(48, 4)}
    adapter = write_adapter(tmp_path / "adapter", tensors, target_modules=["c_attn"])
    found = audit(adapter, base=base)
    assert (found.errors, found.doubts) == ([], [])


def test_a_base_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--nobody--no-base"
    write_base(cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    found = audit(write_adapter(tmp_path / "adapter"))
    assert found.base is not None
    assert found.base.folder.name == "abc"


DOUBTFUL: dict[str, tuple[dict[str, Tensor], str]] = {
    "never trained": (
        {name: filled(0, *shape) for name, (_, shape, _) in lora_tensors().items() if "lora_B" in name},
        "lora_B all zero: untrained",
    ),
    "partly trained": ({B: filled(0, 16, 4)}, "lora_B all zero, others are not"),
    "half a shard": ({B: ("F32", (16, 4), floats(8, 4)[2] + bytes(128))}, "8 rows of 16 that are all zero"),
    "zero": ({A: filled(0, 4, 16)}, "is all zero"),
    "constant": ({A: filled(0.5, 4, 16)}, "one and the same value"),
    "eight bits": ({A: ("F8_E4M3", (4, 16), bytes(range(1, 65)))}, "F8_E4M3"),
    "a copied embedding": ({"base_model.model.lm_head.weight": floats(10, 16)}, "the base's own embedding"),
}


@pytest.mark.parametrize(("changes", "says"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_doubts(changes: dict[str, Tensor], says: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, lora_tensors() | changes)
    assert errors(folder) == ""
    assert says in doubts(folder)


PROMPT = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_CLS", "num_virtual_tokens": 3, "token_dim": 8}


def test_prompts(tmp_path: Path) -> None:
    head = {"base_model.classifier.weight": floats(2, 8)}
    assert errors(write_adapter(tmp_path / "good", {"prompt_embeddings": floats(3, 8)} | head, **PROMPT)) == ""
    text = errors(write_adapter(tmp_path / "short", {"prompt_embeddings": floats(2, 8)}, **PROMPT))
    assert "prompt_embeddings: is [2, 8], not [3, 8] as num_virtual_tokens 3, token_dim 8 make it" in text
    assert "is missing" in errors(write_adapter(tmp_path / "none", head, **PROMPT))
    stray = {"prompt_embeddings": floats(3, 8), "base_model.model.q_proj.lora_A.weight": floats(2)}
    assert "is no tensor of PROMPT_TUNING" in errors(write_adapter(tmp_path / "stray", stray, **PROMPT))


def test_what_a_prompt_config_leaves_open_comes_from_the_base(tmp_path: Path) -> None:
    config = {name: value for name, value in PROMPT.items() if name != "token_dim"}
    adapter = write_adapter(tmp_path / "adapter", {"prompt_embeddings": floats(3, 8)}, **config)
    assert errors(adapter) == ""
    base = write_base(tmp_path / "base", hidden_size=16, num_attention_heads=2)
    assert "is [3, 8], not [3, 16]" in errors(adapter, base=base)


def test_trained_tokens_beside_lora(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")  # 10 tokens
    rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": floats(2, 16)}
    good = write_adapter(tmp_path / "good", lora_tensors() | rows, trainable_token_indices=[1, 9])
    assert errors(good) == errors(good, base=base) == ""
    short = write_adapter(tmp_path / "short", lora_tensors() | rows, trainable_token_indices=[1, 2, 3])
    assert "is [2, 16], not [3, 16]" in errors(short)
    beyond = write_adapter(tmp_path / "beyond", lora_tensors() | rows, trainable_token_indices=[1, 10])
    assert errors(beyond) == ""
    assert "trainable_token_indices: token 10 is not in model.embed_tokens" in errors(beyond, base=base)
    missing = write_adapter(tmp_path / "missing", trainable_token_indices=[1])
    assert "asks for trainable_token_indices" in errors(missing)


def test_fused_experts(tmp_path: Path) -> None:
    """Two parameters of one module: the one wrapped first has `base_layer` in its name."""
    path = "base_model.model.model.layers.0.mlp.experts."
    tensors = {
        f"{path}base_layer.lora_A.weight": floats(12, 16),
        f"{path}base_layer.lora_B.weight": floats(8, 12),
        f"{path}lora_A.weight": floats(12, 8),
        f"{path}lora_B.weight": floats(16, 12),
    }
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    folder = write_adapter(tmp_path, tensors, target_modules=None, target_parameters=names)
    assert errors(folder) == ""
    tensors[f"{path}lora_A.weight"] = floats(11, 8)
    assert "is [11, 8], not [8, 8]" in errors(write_adapter(tmp_path, tensors, target_parameters=names))


def test_an_adapter_of_copies_alone(tmp_path: Path) -> None:
    head = {"base_model.model.lm_head.weight": floats(10, 16)}
    assert "asks for LORA" in errors(write_adapter(tmp_path, head, modules_to_save=["lm_head"]))
    dummy = {"target_modules": ["dummy-target-modules"], "modules_to_save": ["lm_head"]}
    assert errors(write_adapter(tmp_path, head, **dummy)) == ""


def test_thousands_of_strays_are_one_error(tmp_path: Path) -> None:
    strays = {f"base_model.model.x{i}.weight": filled(1, 1) for i in range(3000)}
    assert "(and 2999 more)" in errors(write_adapter(tmp_path, lora_tensors() | strays))
    assert len(errors(tmp_path)) < 1000


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        audit(tmp_path / "nowhere")
    adapter = write_adapter(tmp_path / "run" / "checkpoint-100")
    with pytest.raises(InputError, match=r"(?s)adapter_config.json.*checkpoint-100 holds an adapter"):
        audit(adapter.parent)
    with pytest.raises(InputError, match="is a file"):
        audit(adapter / "adapter_config.json")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        audit(adapter)
    (adapter / "adapter_model.safetensors").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"symbolic link to 'nowhere'"):
        audit(adapter)


def test_config_and_weights_are_told_together(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, r=-1)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        audit(folder)
    assert "adapter_config.json: r: -1" in str(caught.value)
    assert "adapter_model.safetensors: is empty" in str(caught.value)


def test_no_tensors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no tensors"):
        audit(write_adapter(tmp_path, {}))


def test_a_pickle_beside_safetensors_is_not_opened(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    os.mkfifo(folder / "adapter_model.bin")  # opening it would hang
    assert errors(folder) == ""


@pytest.mark.parametrize("name", GOLDEN or [pytest.param("none", marks=pytest.mark.skip("no shared data"))])
def test_golden(name: str, tmp_path: Path) -> None:
    """What real PEFT wrote is found right, with and without the base it belongs to."""
    case = json.loads(GOLDEN[name].read_text())
    folder = GOLDEN[name].parent / "adapter"
    if json.loads((folder / "adapter_config.json").read_text())["peft_type"] not in METHODS:
        pytest.skip("a method we do not have")
    for base in (None, SHARED / "golden" / "bases" / case["base"]):
        try:
            found = audit(folder, base=base)
        except InputError as error:
            if "unknown field" in str(error):
                pytest.skip("a variant we do not have")
            raise
        assert (found.errors, found.doubts) == ([], [])
