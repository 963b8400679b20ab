"""`--to merged`: base + adapters as a Hugging Face model folder, tensor by tensor.

What no adapter touches is copied inside the kernel, byte for byte; products (LoRA) are added to what is stored a block of
rows at a time; any other tensor that changes is read, changed and written before the next one is looked at. So a model of
any size needs the memory of its largest tensor at most.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftcli.adapters.header import BITS
from peftcli.adapters.values import FLOATS
from peftcli.errors import InputError
from peftcli.export.changes import Change, Changes
from peftcli.export.layers import replicated_config
from peftcli.export.quantized import choose_rounding
from peftcli.export.sums import wider, write_all, write_sum
from peftcli.lazy import torch
from peftcli.merging.base_weights import BaseWeights
from peftcli.merging.floats import STORED
from peftcli.merging.output import new_folder, require_free
from peftcli.merging.source import Source
from peftcli.merging.tensors import DTYPES, copy_range, header_bytes, tensor_bytes

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = re.compile(
    r"tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|.*\.jinja"
    r"|(spiece|sentencepiece\.bpe)\.model|tekken\.json|.*\.tiktoken"
)
OTHER_FILES = re.compile(
    r"generation_config\.json|(pre)?processor_config\.json|video_preprocessor_config\.json|LICENSE.*"
)
KINDS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""`--dtype` and what the files call it."""


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        changed: tensors that differ from the base's.
        copied: tensors that were copied.
        size: bytes of the weights.
        unties: whether input and output embeddings are separate now.
        files: names of the weight files.
    """

    changed: int
    copied: int
    size: int
    unties: bool
    files: list[str]


def export_merged(
    adapters: Sequence[Path],
    base: Path,
    output: Path,
    *,
    dtype: str | None = None,
    shard_size: int | None = None,
    quantized_base: str | None = None,
    overwrite: bool = False,
) -> Merged:
    """Write base + adapters as a model folder.

    Args:
        adapters: adapter folders, the first applied first.
        base: the base model's folder.
        output: the folder to write.
        dtype: `bfloat16`, `float16` or `float32` for all floating tensors; as in the base by default.
        shard_size: bytes a weight file may have; by default the base's own files.
        quantized_base: for adapters trained on a quantised base, what to merge into: `original` or `dequantized`.
        overwrite: replace an earlier result.

    Raises:
        InputErrors: for adapters that are broken or do not fit, methods that can't be merged, quantised bases.
    """
    inputs = [*adapters, base]
    require_free(output, inputs=inputs, overwrite=overwrite)
    weights = BaseWeights(base)
    _refuse_quantized(weights)
    if dtype is not None and dtype not in KINDS:
        raise InputError(f"{dtype!r} is no dtype to write", field="--dtype", allowed=", ".join(KINDS))
    sources = [Source(folder, weights) for folder in adapters]
    changes = Changes(weights, sources, choose_rounding(adapters[0], base, quantized_base))
    files = _shards(changes, weights, KINDS.get(dtype or ""), shard_size)
    size = sum(_size(change, KINDS.get(dtype or "")) for group in files.values() for change in group)
    with new_folder(output, inputs=inputs, overwrite=overwrite, size=size) as folder:
        for name, group in files.items():
            _write_file(folder / name, group, changes, KINDS.get(dtype or ""))
        if len(files) > 1:
            _write_index(folder, files, size)
        _write_config(folder, changes, dtype)
        _copy_files(folder, base, adapters)
    untouched = sum(change.is_untouched for change in changes.tensors.values())
    return Merged(len(changes.tensors) - untouched, untouched, size, changes.unties, list(files))


def _refuse_quantized(base: BaseWeights) -> None:
    if base.facts.config.get("quantization_config"):
        raise InputError(
            "the base's weights are quantised: rounding to 4 or 8 bits again would lose nearly all of the adapter",
            place=base.folder,
            field="--base",
            fix="name the model it was quantised from",
        )


def _dtype(change: Change, wanted: str | None) -> str:
    """safetensors' name of the dtype a tensor is written in. One that only an adapter has keeps its own."""
    info = change.origin or (change.copy[1] if change.copy else None)
    assert info is not None
    return wanted if wanted and info.dtype in FLOATS else info.dtype


def _size(change: Change, wanted: str | None) -> int:
    count = 1
    for length in change.shape:
        count *= length
    return count * BITS[_dtype(change, wanted)] // 8


def _shards(changes: Changes, base: BaseWeights, dtype: str | None, limit: int | None) -> dict[str, list[Change]]:
    """The files to write, by name: the base's own, or as many as a size allows."""
    everything = list(changes.tensors.values())
    if limit is None and not changes.replication:
        groups: dict[str, list[Change]] = {path.name: [] for path in base.files.values()}
        last = next(reversed(groups))
        for change in everything:
            groups[base.files[change.origin.name].name if change.origin else last].append(change)
        return {name: group for name, group in groups.items() if group}
    parts: list[list[Change]] = [[]]
    filled = 0
    for change in everything:
        size = _size(change, dtype)
        if parts[-1] and limit is not None and filled + size > limit:
            parts.append([])
            filled = 0
        parts[-1].append(change)
        filled += size
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, start=1)}


def _write_file(path: Path, group: Sequence[Change], changes: Changes, wanted: str | None) -> None:
    entries = {change.name: (_dtype(change, wanted), change.shape, _size(change, wanted)) for change in group}
    with path.open("wb") as file:
        file.write(header_bytes(entries, {"format": "pt"}))
        file.flush()
        for change in group:
            origin = change.origin
            if change.is_untouched and origin is not None and origin.dtype == entries[change.name][0]:
                with changes.base.files[origin.name].open("rb") as source:
                    copy_range(source.fileno(), origin.start, file.fileno(), origin.stop - origin.start)
            else:
                _write_tensor(file.fileno(), change, changes, entries[change.name][0])
        os.fsync(file.fileno())


def _write_tensor(target: int, change: Change, changes: Changes, dtype: str) -> None:
    stored, products = changes.stored(change), None
    if {stored[1].dtype, dtype} <= STORED.keys():
        products = changes.products(change)
    if products is not None:
        write_sum(*stored, target, products, dtype)
        return
    value = changes.value(change).to(getattr(torch, DTYPES[dtype]))
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise InputError(f"{change.name} would hold NaN or infinity", fix=wider(dtype))
    assert tuple(value.shape) == change.shape
    write_all(target, tensor_bytes(value))


def _write_index(folder: Path, files: dict[str, list[Change]], size: int) -> None:
    where = {change.name: name for name, group in files.items() for change in group}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(folder: Path, changes: Changes, dtype: str | None) -> None:
    """The base's config with what the adapters changed: ties, rows of the embedding, layers, dtype."""
    facts = changes.base.facts
    config = dict(facts.config)
    inner = dict(config["text_config"]) if facts.language_config is not facts.config else config
    if changes.unties:
        config["tie_word_embeddings"] = inner["tie_word_embeddings"] = False
    rows = _embedding_rows(changes)
    if rows is not None and isinstance(inner.get("vocab_size"), int):
        inner["vocab_size"] = rows
    count = inner.get("num_hidden_layers")
    if changes.replication and isinstance(count, int):
        inner.update(replicated_config(inner, changes.replication, count))
    if inner is not config:
        config["text_config"] = inner
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _embedding_rows(changes: Changes) -> int | None:
    """The embedding's rows if an adapter brings its own."""
    ends = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")
    grown = (c for c in changes.tensors.values() if c.copy and f".{c.name}".endswith(tuple(f".{end}" for end in ends)))
    return next((change.shape[0] for change in grown), None)


def _copy_files(folder: Path, base: Path, adapters: Sequence[Path]) -> None:
    """Tokenizer and generation settings; a tokenizer beside an adapter is the one it was trained with."""
    own = next((path for path in adapters if (path / "tokenizer_config.json").is_file()), base)
    for source, pattern in ((base, OTHER_FILES), (own, TOKENIZER_FILES)):
        for path in _matching(source, pattern):
            shutil.copyfile(path, folder / path.name)


def _matching(folder: Path, pattern: re.Pattern[str]) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if pattern.fullmatch(path.name) and path.is_file())
