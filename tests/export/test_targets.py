"""What other programs make of an adapter; and the fixes the table names do fix it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from merging.lab import load_base, save_adapter, save_base

from peftcli import PromptTuningConfig, get_peft_model
from peftcli.adapters.config import CONFIG_NAME
from peftcli.export.lora import export_lora
from peftcli.export.targets import CHECKS, judge
from peftcli.merging.algebra import Rank


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("targets") / "base", tie_word_embeddings=True)


def verdicts(adapter: Path, target: str) -> dict[str, str]:
    return {row.what: row.verdict for row in judge(adapter, target)}


@pytest.mark.parametrize("target", [*CHECKS, "transformers"])
def test_plain_lora_is_ok_everywhere(base: Path, tmp_path: Path, target: str) -> None:
    save_adapter(tmp_path / "a", base, r=8, lora_alpha=16)
    assert set(verdicts(tmp_path / "a", target).values()) == {"ok"}


@pytest.mark.parametrize(
    ("fields", "target", "what"),
    [
        ({"use_rslora": True}, "sglang", "scale"),
        ({"use_rslora": True}, "llama.cpp", "scale"),
        ({"alpha_pattern": {"q_proj": 3}}, "vllm", "scale"),
        ({"alpha_pattern": {"q_proj": 3}}, "ollama", "scale"),
        ({"rank_pattern": {"q_proj": 3}}, "vllm", "one rank"),
        ({"r": 12, "rank_pattern": {"q_proj": 3}}, "sglang", "one rank"),
    ],
)
def test_what_portable_fixes(base: Path, tmp_path: Path, fields: dict, target: str, what: str) -> None:
    save_adapter(tmp_path / "a", base, **fields)
    assert verdicts(tmp_path / "a", target)[what] == "fixable"
    export_lora(tmp_path / "a", tmp_path / "p", portable=True)
    assert set(verdicts(tmp_path / "p", target).values()) == {"ok"}


@pytest.mark.parametrize(
    ("fields", "target", "what", "verdict"),
    [
        ({"use_rslora": True}, "vllm", "scale", "ok"),
        (
            {"rank_pattern": {"q_proj": 3}},
            "llama.cpp",
            "scale",
            "ok",
        ),  # it divides by the tensor's own rank, as PEFT does
        ({"r": 12}, "vllm", "rank", "ok"),
        ({"r": 16, "target_modules": ["lm_head"]}, "llama.cpp", "modules", "fixable"),
        ({"r": 16, "target_modules": ["embed_tokens"]}, "llama.cpp", "modules", "fixable"),
        ({"modules_to_save": ["lm_head"]}, "vllm", "tensors", "fixable"),
        ({"trainable_token_indices": [1]}, "vllm", "tensors", "fixable"),
        ({"use_dora": True}, "vllm", "method", "fixable"),
        ({"layer_replication": [[0, 2], [0, 1]]}, "sglang", "layers", "fixable"),
        ({"use_dora": True}, "transformers", "peft", "ok"),
        ({"trainable_token_indices": [1]}, "transformers", "peft", "fixable"),
    ],
)
def test_rules(base: Path, tmp_path: Path, fields: dict, target: str, what: str, verdict: str) -> None:
    save_adapter(tmp_path / "a", base, **fields)
    assert verdicts(tmp_path / "a", target)[what] == verdict


def test_ranks_above_the_default(tmp_path: Path) -> None:
    base = save_base(tmp_path / "wide", hidden_size=64)
    save_adapter(tmp_path / "a", base, r=40, lora_alpha=40)
    (row,) = [row for row in judge(tmp_path / "a", "vllm") if row.what == "rank"]
    assert (row.verdict, row.note.rpartition(" ")[2]) == ("fixable", "64")


def test_methods_and_prompts(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "loha", base, "LOHA", r=2)
    assert verdicts(tmp_path / "loha", "vllm") == {"method": "fixable"}
    export_lora(tmp_path / "loha", tmp_path / "p", portable=True, rank=Rank(number=4))
    assert set(verdicts(tmp_path / "p", "vllm").values()) == {"ok"}
    prompt = get_peft_model(load_base(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompt.save_pretrained(tmp_path / "prompt")
    assert verdicts(tmp_path / "prompt", "llama.cpp") == {"method": "impossible"}


@pytest.mark.parametrize("target", CHECKS)
def test_what_the_configs_text_must_say(base: Path, tmp_path: Path, target: str) -> None:
    """PEFT has a default for it; the others stumble."""
    save_adapter(tmp_path / "a", base, r=8, lora_alpha=8)
    path = tmp_path / "a" / CONFIG_NAME
    written = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in written.items() if key != "lora_alpha"}))
    assert verdicts(tmp_path / "a", target)["config"] == "fixable"
    export_lora(tmp_path / "a", tmp_path / "p", portable=True)
    assert set(verdicts(tmp_path / "p", target).values()) == {"ok"}


def test_vllm_goes_by_the_configs_bias(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", base, r=8, bias="all")  # the base has none
    assert verdicts(tmp_path / "a", "vllm")["bias"] == "fixable"
    export_lora(tmp_path / "a", tmp_path / "p", portable=True)
    assert verdicts(tmp_path / "p", "vllm")["bias"] == "ok"


@pytest.mark.parametrize("target", CHECKS)
def test_variants_are_not_taken_for_lora(base: Path, tmp_path: Path, target: str) -> None:
    save_adapter(tmp_path / "a", base, r=8, alora_invocation_tokens=[1, 2])
    assert verdicts(tmp_path / "a", target) == {"method": "impossible"}
