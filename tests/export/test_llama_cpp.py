"""Our GGUF adapters in a real llama.cpp (PyPI's xllamacpp): what comes next, with and without them, against transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from merging.lab import load, load_base, save_adapter, save_base
from training.tiny import VOCABULARY

from peftcli.export.gguf import export_gguf

PYTHON = os.environ.get("PEFTCLI_LLAMA_PYTHON", sys.executable if find_spec("xllamacpp") else "")
"""A Python that has xllamacpp; it runs in a process of its own."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="no xllamacpp: `make test-slow` installs it, or set PEFTCLI_LLAMA_PYTHON"),
]

TOLERANCE = 1e-4
"""Of a logprob, all in float32; 1.5e-6 was seen."""
IDS = list(range(3, 20))
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def in_llama_cpp(model: Path, adapter: Path | None) -> torch.Tensor:
    """Logprobs [vocabulary] of the next token."""
    script = Path(__file__).with_name("llama_cpp_logprobs.py")
    arguments = [model, adapter or "-", json.dumps(IDS), VOCABULARY]
    done = subprocess.run(
        [PYTHON, script, *map(str, arguments)], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = {int(token): logprob for token, logprob in json.loads(done.stdout.splitlines()[-1]).items()}
    assert told.keys() == set(range(VOCABULARY))
    return torch.tensor([told[token] for token in range(VOCABULARY)])


@torch.no_grad()
def in_transformers(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=torch.tensor([IDS])).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_rslora": True, "target_modules": LINEAR},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}, "target_modules": LINEAR},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ],
    ids=["rslora", "patterns", "embeddings"],
)
def test_llama_cpp_says_what_transformers_says(tmp_path: Path, fields: dict) -> None:
    from training.test_model_gguf import write  # skips where the package gguf is missing

    base = save_base(tmp_path / "base", vocab_size=VOCABULARY, head_dim=4)
    save_adapter(tmp_path / "a", base, r=4, lora_alpha=8, **fields)
    export_gguf(tmp_path / "a", base, tmp_path / "g")
    bare, adapted = in_transformers(load_base(base)), in_transformers(load(base, tmp_path / "a"))
    assert (bare - adapted).abs().max() > 1000 * TOLERANCE
    model = write(tmp_path / "base.gguf", load_base(base))
    torch.testing.assert_close(in_llama_cpp(model, None), bare, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(in_llama_cpp(model, tmp_path / "g/adapter.gguf"), adapted, atol=TOLERANCE, rtol=0)
