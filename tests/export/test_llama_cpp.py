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
from gguf_files import BASES, linear_modules, save_base, write
from merging.lab import load, load_base, save_adapter
from training.tiny import VOCABULARY

from peftcli.export.gguf import export_gguf

PYTHON = os.environ.get("PEFTCLI_LLAMA_PYTHON", sys.executable if find_spec("xllamacpp") else "")
"""A Python that has xllamacpp; it runs in a process of its own."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="no xllamacpp: `make test-slow` installs it, or set PEFTCLI_LLAMA_PYTHON"),
]

TOLERANCE = 1e-4
"""Of a logprob, all in float32; 1.3e-5 was seen."""
GELU_TOLERANCE = 1e-2
"""Where llama.cpp looks GELU up in a table of 16-bit values: 3e-3 was seen, without an adapter, too."""
IDS = list(range(3, 20))


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


CASES = [(kind, {"use_rslora": True}) for kind in BASES] + [
    ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}),
]


@pytest.mark.parametrize(("kind", "fields"), CASES, ids=[*BASES, "patterns"])
def test_llama_cpp_says_what_transformers_says(tmp_path: Path, kind: str, fields: dict) -> None:
    base = save_base(tmp_path / "base", kind)
    save_adapter(tmp_path / "a", base, r=4, lora_alpha=8, target_modules=linear_modules(kind), **fields)
    export_gguf(tmp_path / "a", base, tmp_path / "g")
    bare, adapted = in_transformers(load_base(base)), in_transformers(load(base, tmp_path / "a"))
    assert (bare - adapted).abs().max() > 1
    model = write(tmp_path / "base.gguf", load_base(base))
    tolerance = GELU_TOLERANCE if kind.startswith("gemma") else TOLERANCE
    torch.testing.assert_close(in_llama_cpp(model, None), bare, atol=tolerance, rtol=0)
    torch.testing.assert_close(in_llama_cpp(model, tmp_path / "g/adapter.gguf"), adapted, atol=tolerance, rtol=0)
