"""`base_fingerprint.json` beside an adapter: which base it was trained on, told by the base itself and not by its name.

    config      numbers of the base's config that decide what its weights mean, and its model type
    modules     sha256 over path and size of every linear and norm-like module of the body, for one version of transformers
    embeddings  sha256 over the first rows of the input embedding, rounded to bfloat16: the same in float32, in bfloat16
                and after tokens were added, different for another training of the same architecture

PEFT, vLLM and llama.cpp read the files they know by name, so this one is no burden to them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peftcli.errors import InputError, printable
from peftcli.files import read_strict_json, write_atomically

FILE = "base_fingerprint.json"
FORMAT = 1
ROWS = 32
MAX_BYTES = 64 << 10
NUMBERS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "num_local_experts", "n_embd", "n_layer", "n_head", "d_model", "num_layers", "num_heads", "d_kv", "d_ff",
)  # fmt: skip
"""Fields of a text config; each model type has some of them."""


def fingerprint(model: Any) -> dict[str, Any] | None:
    """What tells a base without adapters from others; None where it is no transformers model."""
    from transformers import PreTrainedModel, __version__

    if not isinstance(model, PreTrainedModel):
        return None
    text = model.config.get_text_config().to_dict()
    return {
        "format": FORMAT,
        "name": model.config.name_or_path,
        "config": config_facts({**text, "model_type": model.config.model_type}),
        "transformers": __version__,
        "modules": hashlib.sha256("\n".join(_module_sizes(model.base_model)).encode()).hexdigest(),
        "embeddings": _embeddings(model),
    }


def config_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a `config.json` that has to be the same."""
    numbers = {name: config[name] for name in NUMBERS if isinstance(config.get(name), int)}
    return {"model_type": config.get("model_type"), **numbers}


def write_fingerprint(folder: Path, base: Mapping[str, Any] | None) -> None:
    """Write the file, with the base's name cut to its last part: a card says no more of the machine either."""
    if base is not None:
        values = {**base, "name": str(base["name"]).replace("\\", "/").rstrip("/").rpartition("/")[2]}
        write_atomically(folder / FILE, json.dumps(values, indent=1) + "\n")


def check_fingerprint(folder: Path, base: Mapping[str, Any] | None) -> None:
    """Refuse to put an adapter on another base than it was trained on.

    Args:
        folder: the adapter's.
        base: what `fingerprint` or `config_facts` (as `config`) says of the base at hand; None if it can't be told.

    Raises:
        InputError: naming what differs.
    """
    path = folder / FILE
    if base is None or not path.is_file():
        return
    stored = read_strict_json(path, limit=MAX_BYTES)
    if stored.get("format") != FORMAT:
        return  # of a later version, which may compare other things
    if difference := _difference(stored, base):
        name = printable(stored.get("name") or "")
        raise InputError(
            f"the adapter was trained on another base{f' ({name})' if name else ''}: {difference}",
            place=path,
            fix="load the base it was trained on; to use it on this one all the same, delete this file",
        )


def _difference(stored: Mapping[str, Any], base: Mapping[str, Any]) -> str | None:
    """The first thing that is not the same, in words."""
    before = stored.get("config")
    known: Mapping[str, Any] = before if isinstance(before, dict) else {}
    for field, value in base["config"].items():
        if field in known and known[field] != value:
            return f"its {field} was {printable(known[field])}, this one's is {printable(value)}"
    if stored.get("transformers") == base.get("transformers") and _differ("modules", stored, base):
        return "its modules have other names or sizes"
    if _differ("embeddings", stored, base):
        return "it has the same shapes, but other weights (the first rows of the embedding differ)"
    return None


def _differ(part: str, stored: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    return None not in (stored.get(part), base.get(part)) and stored[part] != base[part]


def _module_sizes(body: Any) -> Iterator[str]:
    """Path and size of the modules of a base's body; embeddings, which grow with the vocabulary, are left out."""
    for path, module in body.named_modules():
        size = [getattr(module, name, None) for name in ("out_features", "in_features", "normalized_shape", "nf", "nx")]
        if any(size):
            yield f"{path} {[list(part) if isinstance(part, tuple) else part for part in size]}"


def _embeddings(model: Any) -> str | None:
    """sha256 of the first rows of the input embedding; None where they aren't here (meta device, sharded, quantised)."""
    import torch

    weight: Any
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:
        return None
    here = isinstance(weight, torch.Tensor) and not weight.is_meta and not hasattr(weight, "full_tensor")
    if not here or weight.dim() != 2 or not weight.numel() or weight.dtype not in (torch.float32, torch.bfloat16):
        return None  # float16 has lost small values and rounds twice on the way to bfloat16
    first = weight.detach()[:ROWS].to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(first.view(torch.uint8).numpy().tobytes()).hexdigest()
