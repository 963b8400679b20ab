"""`--to gguf`: a LoRA adapter file for llama.cpp, and a Modelfile that gives it to Ollama.

llama.cpp scales each pair by one alpha over the pair's rank. So pairs are filled up to one rank, the scaling is folded
into B, and alpha is that rank: rsLoRA and patterns come out right, which its own converter gets wrong. It rotates
neighbouring pairs of a head's features where transformers rotates the two halves, so rows of q and k change places.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.errors import InputError, InputErrors
from peftcli.export.lora import Exported, plain_factors
from peftcli.export.modelfile import modelfile
from peftcli.lazy import numpy
from peftcli.merging.algebra import LowRank, Rank, padded
from peftcli.merging.base_weights import BaseWeights
from peftcli.merging.output import new_folder, require_free
from peftcli.merging.source import Source

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILE, MODELFILE = "adapter.gguf", "Modelfile"

ARCHITECTURES = {
    **{"llama": "llama", "mistral": "llama", "smollm3": "smollm3", "granite": "granite"},
    **{"qwen2": "qwen2", "qwen3": "qwen3", "olmo2": "olmo2", "phi3": "phi3"},
    **{"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3"},
}
"""model_type and what llama.cpp calls it; each was run in llama.cpp. Others have layouts that were not looked at."""

PERMUTED = frozenset({"llama", "smollm3", "granite"})
"""Architectures whose q and k are stored for llama.cpp's order of rotation."""

DTYPES = ("float32", "float16")


def export_gguf(
    adapter: Path,
    base: Path,
    output: Path,
    *,
    rank: Rank | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write `adapter.gguf` and `Modelfile`.

    Args:
        adapter: any adapter with an update of weight matrices.
        base: the base model's folder: its sizes decide names and order.
        output: the folder to write.
        rank: as in `export_lora`.
        dtype: `float32` (default) or `float16`.
        overwrite: replace an earlier result.

    Raises:
        InputErrors: for bases whose layout we do not know, modules llama.cpp does not adapt, and what LoRA can't hold.
    """
    inputs = [adapter, base]
    require_free(output, inputs=inputs, overwrite=overwrite)
    if dtype not in (None, *DTYPES):
        raise InputError(f"{dtype!r} is no dtype to write", field="--dtype", allowed=", ".join(DTYPES))
    weights = BaseWeights(base)
    architecture = _architecture(weights)
    source = Source(adapter, weights)
    factors, energy, is_exact = plain_factors(source, rank)
    names = _names(source, weights, architecture)
    r = max(pair.rank for pair in factors.values())
    size = 8 * sum(pair.a.size + pair.b.size for pair in factors.values())
    with new_folder(output, inputs=inputs, overwrite=overwrite, size=size) as folder:
        writer = _writer(folder / FILE, architecture, r, source)
        for module, name in names.items():
            a, b = _pair(name, padded(factors[module], r), weights, architecture)
            for part, tensor in (("a", a), ("b", b)):
                array = numpy.ascontiguousarray(tensor, dtype or "float32")
                writer.add_tensor(f"{name}.lora_{part}", array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (folder / MODELFILE).write_text(modelfile(adapter, weights.facts, FILE), encoding="utf-8")
    return Exported(len(names), (r, r), energy, is_exact)


def permuted(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows [heads * 2 * half, ...] of each head in llama.cpp's order: halves interleaved."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _architecture(base: BaseWeights) -> str:
    kind = base.facts.model_type
    if kind not in ARCHITECTURES:
        raise InputError(
            f"it is not known how llama.cpp lays out {kind}",
            place=base.folder,
            allowed=", ".join(sorted(ARCHITECTURES)),
            fix="merge it (--to merged) and convert the model with llama.cpp's own convert_hf_to_gguf.py",
        )
    return ARCHITECTURES[kind]


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise InputError("needs the package gguf", field="--to gguf", fix="pip install gguf") from error
    return gguf


def _writer(path: Path, architecture: str, alpha: int, source: Source) -> Any:
    gguf = _package()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    writer.add_name(source.name)
    return writer


def _names(source: Source, base: BaseWeights, architecture: str) -> dict[str, str]:
    """Each adapted module's weight as llama.cpp calls it.

    Raises:
        InputErrors: naming the modules it does not know, and an embedding that is the head there as well: llama.cpp
            would add the one's update to both, in shapes that do not fit, and abort.
    """
    gguf = _package()
    layers = base.facts.language_config.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise InputError("does not say how many layers it has", place=base.folder, field="num_hidden_layers")
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, layers)
    names: dict[str, str] = {}
    problems = []
    for module in source.paths:
        shape = source.adapter(module).shape
        name = table.get_name(f"{module}.weight", try_suffixes=(".weight",))
        tied = name in ("output.weight", "token_embd.weight") and "lm_head.weight" not in base.files
        if name is None or "_norm" in name or shape.kind not in ("linear", "embedding") or tied:
            why = "is one matrix with the embedding or head in this base" if tied else "is nothing llama.cpp adapts"
            problems.append(InputError(f"{module} {why}", place=source.folder, fix="--to merged"))
        else:
            names[module] = name
    if problems:
        raise InputErrors(problems)
    return names


def _pair(name: str, factors: LowRank, base: BaseWeights, architecture: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """A and B as the file holds them."""
    a, b = (factor.astype("f4", copy=False) for factor in (factors.a, factors.b))
    if name == "token_embd.weight":
        return a.T, b  # rows of A are looked up by token there
    heads = _heads(name, base) if architecture in PERMUTED else None
    return a, b if heads is None else permuted(b, heads)


def _heads(name: str, base: BaseWeights) -> int | None:
    """How many heads the rows of q or k belong to; None for all other weights."""
    config = base.facts.language_config
    query = config.get("num_attention_heads")
    if name.endswith("attn_q.weight"):
        return query
    return config.get("num_key_value_heads", query) if name.endswith("attn_k.weight") else None
