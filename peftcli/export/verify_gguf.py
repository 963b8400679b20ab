"""`--to gguf --verify`: the written file read back as llama.cpp reads it, each update compared with the adapter's own.

Nothing of the writer is used: names are put back by a table of our own, rows by their index, and the adapter's update
comes from its method's equation. What llama.cpp does was read in its src/llama-adapter.cpp and llama-graph.cpp: an update
is alpha / rank * B A with the rank of B, alpha 0 meaning a scale of 1, and rows of the token embedding's A are tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.errors import RunError
from peftcli.export.verify import BOUNDS
from peftcli.lazy import numpy, torch
from peftcli.merging.base_weights import BaseWeights
from peftcli.merging.source import Source

if TYPE_CHECKING:
    from numpy.typing import NDArray

MODULES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names and transformers'; within a block both stand behind the block's number."""

NEIGHBOURS = ("llama", "smollm3", "granite")
"""Architectures in which llama.cpp rotates features 2 j and 2 j + 1 of a head together."""

FUSED_UP = "mlp.gate_up_proj"
"""What `ffn_up` is in models that keep gate and up in one matrix (Phi-3)."""


@dataclass(frozen=True)
class UpdateVerdict:
    """How far a file's updates are from the adapter's.

    Attributes:
        difference: the largest |difference| within a module, as a share of the largest |value| of its update.
        module: where that is.
        bound: the share that is allowed; None where the export is no exact one.
        modules: how many were compared.
    """

    difference: float
    module: str
    bound: float | None
    modules: int


def verify_gguf(file: Path, adapter: Path, base: Path, *, is_exact: bool) -> UpdateVerdict:
    """Compare a LoRA GGUF with the adapter it was made from, one module at a time.

    Raises:
        RunError: if modules are missing or unknown, or an exact export's update differs by more than the bound.
    """
    import gguf

    weights = BaseWeights(base)
    source = Source(adapter, weights)
    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    rotates_neighbours = reader.fields["general.architecture"].contents() in NEIGHBOURS
    names = {_module(name, source): name for name in sorted({name.rpartition(".")[0] for name in tensors})}
    if names.keys() != source.paths.keys():
        odd = sorted(names.keys() ^ source.paths.keys())
        raise RunError(f"{file}: does not hold the adapter's modules: {', '.join(odd[:5])}")
    shares = {}
    for module, name in names.items():
        a, b = (tensors[f"{name}.lora_{part}"].astype("f4") for part in "ab")
        rank = b.shape[1]
        found = (alpha / rank if alpha else 1.0) * (b @ (a.T if name == "token_embd.weight" else a))
        if rotates_neighbours and name.endswith(("attn_q.weight", "attn_k.weight")):
            found = found[_rows(len(found), _heads(weights, name))]
        shares[module] = _share(found, _own(source, module))
    worst = max(shares, key=lambda module: (numpy.isnan(shares[module]), shares[module]))
    dtypes = {f"torch.{tensor.dtype}" for tensor in tensors.values()}
    bound = max(BOUNDS[dtype] for dtype in dtypes) if is_exact else None
    if bound is not None and not shares[worst] <= bound:
        raise RunError(
            f"{file}: does not hold the adapter's update: at {worst} it differs by {shares[worst]:.3g} of the update's "
            f"largest value, above the bound of {bound:g}"
        )
    return UpdateVerdict(shares[worst], worst, bound, len(names))


def _module(name: str, source: Source) -> str:
    """`blk.3.attn_q.weight` as `model.layers.3.self_attn.q_proj`; a name that is not known stays as it is."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    part = MODULES.get(match[2]) if match else None
    if match is None or part is None:
        return name
    if match[1] is None:
        return part
    module = f"model.layers.{match[1]}.{part}"
    fused = f"model.layers.{match[1]}.{FUSED_UP}"
    return fused if match[2] == "ffn_up" and fused in source.paths else module


def _heads(base: BaseWeights, name: str) -> int:
    config = base.facts.language_config
    heads: int = config["num_attention_heads"]
    return heads if "attn_q" in name else config.get("num_key_value_heads") or heads


def _rows(count: int, heads: int) -> list[int]:
    """Where each row of transformers' q or k is in llama.cpp's, which rotates features 2 j and 2 j + 1 together."""
    size = count // heads
    half = size // 2
    return [head * size + 2 * (row % half) + row // half for head in range(heads) for row in range(size)]


def _own(source: Source, module: str) -> NDArray[Any]:
    """The adapter's update [out, in] by its method's own equation."""
    adapter = source.adapter(module)
    with torch.no_grad():
        return source.matrix(adapter, source.tensors(module, adapter))


def _share(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Largest |difference| over the largest |value|; infinite where zeros became something."""
    if found.shape != wanted.shape:
        return float("inf")
    difference, largest = float(abs(found - wanted).max()), float(abs(wanted).max())
    return difference / largest if largest else float("inf") if difference else 0.0
