"""What an adapter holds beside its method's tensors: modules trained in full, biases, embeddings."""

from __future__ import annotations

from pathlib import Path

from peftcli.adapters.base_facts import BaseFacts
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.findings import Findings
from peftcli.adapters.fit import Fit
from peftcli.adapters.header import TensorInfo
from peftcli.adapters.keys import PREFIX, Key
from peftcli.errors import printable

EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out"})
"""Modules whose weights PEFT stores beside the adapter when tokens were added to the base."""

HEADS = frozenset({"classifier", "score", "qa_outputs"})
"""What PEFT adds to `modules_to_save` by task; a model has one of them."""


def check_copies(
    config: TunerConfig,
    others: list[tuple[Key, TensorInfo]],
    fits: dict[str, Fit],
    base: BaseFacts | None,
    findings: Findings,
    folder: Path,
) -> dict[str, TensorInfo]:
    """Check every tensor that is not the method's own.

    Returns:
        Those that belong into the file, by key.
    """
    copies = {}
    saved: set[str] = set()
    for key, tensor in others:
        entry = _entry(config.modules_to_save, key.site)
        if entry is not None:
            saved.add(entry)
            _compare(key, tensor, base, findings, folder)
        elif key.site.rpartition(".")[2] in EMBEDDINGS and key.parameter == "weight":
            findings.doubt(f"is the base's own embedding, stored once more ({tensor.nbytes:,} bytes)", tensor.name)
        elif not _is_trained_bias(config, key):
            findings.error(f"is no tensor of {config.peft_type}, and `modules_to_save` does not name it", tensor.name)
            continue
        copies[tensor.name] = tensor
    _check_all_saved(config.modules_to_save or [], saved, findings)
    _check_biases(config, fits, {key.name for key, _ in others}, findings)
    return copies


def _entry(modules_to_save: list[str] | None, site: str) -> str | None:
    """The entry of `modules_to_save` a module is, or lies within."""
    return next((entry for entry in modules_to_save or [] if f".{entry}." in f".{site}."), None)


def _compare(key: Key, tensor: TensorInfo, base: BaseFacts | None, findings: Findings, folder: Path) -> None:
    """A copy has its original's shape; rows may be more where a tokenizer beside the adapter explains them."""
    original = base.find(f"{key.site}.{key.parameter}") if base else None
    if base is None or original is None or original.shape == tensor.shape:
        return
    text = f"is {list(tensor.shape)}, but {list(original.shape)} in the base {printable(base.folder.name)}"
    grown = tensor.shape[1:] == original.shape[1:] and tensor.shape[:1] > original.shape[:1]
    if grown and (folder / "tokenizer_config.json").is_file():
        findings.doubt(f"{text}: the base's embeddings must be resized first", tensor.name)
    else:
        findings.error(text, tensor.name)


def _is_trained_bias(config: TunerConfig, key: Key) -> bool:
    trained = getattr(config, "bias", "none") != "none"
    return trained and (key.parameter.endswith("bias") or key.site.endswith("bias"))


def _check_all_saved(wanted: list[str], saved: set[str], findings: Findings) -> None:
    """Each entry has tensors; of the heads PEFT adds by itself, one is enough."""
    for entry in wanted:
        if entry not in saved and not (entry in HEADS and saved & HEADS):
            findings.error("is in `modules_to_save`, but has no tensors in the file", entry)


def _check_biases(config: TunerConfig, fits: dict[str, Fit], present: set[str], findings: Findings) -> None:
    """Biases of adapted modules are there if they were trained (PEFT 0.13.0 lost them)."""
    if getattr(config, "bias", "none") == "none":
        return
    for path, option in fits.items():
        names = {f"{PREFIX}{path}.bias", f"{PREFIX}{path}.base_layer.bias"}
        if option.shape.has_bias and not names & present:
            findings.error(f"was trained (`bias` is {getattr(config, 'bias', None)!r}) but is missing", min(names))
