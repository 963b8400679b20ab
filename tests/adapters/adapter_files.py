"""Adapter files written by hand, byte by byte, so that they can be as wrong as a test needs them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftcli.adapters.header import BITS

Tensor = tuple[str, tuple[int, ...], bytes]
"""dtype, shape, bytes."""

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "nobody/no-base",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
}

PATH = "base_model.model.model.layers.{layer}.self_attn.{module}.{name}"


def floats(*shape: int, seed: int = 1) -> Tensor:
    """An F32 tensor of values that differ and are not zero."""
    count = math.prod(shape)
    return "F32", shape, struct.pack(f"<{count}f", *(((seed * 7919 + i) % 97 + 1) / 100 for i in range(count)))


def filled(value: float, *shape: int) -> Tensor:
    count = math.prod(shape)
    return "F32", shape, struct.pack(f"<{count}f", *[value] * count)


def lora_tensors(*, layers: int = 2, r: int = 4, hidden: int = 16, kv: int = 8) -> dict[str, Tensor]:
    """LoRA on q_proj [hidden, hidden] and v_proj [kv, hidden] of each layer."""
    tensors = {}
    for layer in range(layers):
        for module, out in (("q_proj", hidden), ("v_proj", kv)):
            tensors[PATH.format(layer=layer, module=module, name="lora_A.weight")] = floats(r, hidden, seed=layer + 1)
            tensors[PATH.format(layer=layer, module=module, name="lora_B.weight")] = floats(out, r, seed=layer + 9)
    return tensors


def safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A well-formed file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        assert len(content) * 8 == math.prod(shape) * BITS[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    """A file with this header, whatever it says."""
    return struct.pack("<Q", len(header)) + header + data


def write_adapter(folder: Path, tensors: Mapping[str, Tensor] | None = None, **changes: Any) -> Path:
    """An adapter folder; `changes` are laid over `CONFIG`, or stand alone if they name another method."""
    folder.mkdir(parents=True, exist_ok=True)
    config = changes if "peft_type" in changes else CONFIG | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(safetensors(lora_tensors() if tensors is None else tensors))
    return folder


def write_base(folder: Path, *, layers: int = 2, hidden: int = 16, kv: int = 8, **config: Any) -> Path:
    """A base model's folder that the adapters above belong to."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"model_type": "llama", "num_hidden_layers": layers, "vocab_size": 10} | config
    (folder / "config.json").write_text(json.dumps(values))
    tensors = {"model.embed_tokens.weight": floats(10, hidden), "lm_head.weight": floats(10, hidden)}
    for layer in range(layers):
        for module, out in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv), ("o_proj", hidden)):
            tensors[f"model.layers.{layer}.self_attn.{module}.weight"] = floats(out, hidden)
    (folder / "model.safetensors").write_bytes(safetensors(tensors))
    return folder
