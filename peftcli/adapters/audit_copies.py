"""What an adapter holds beside its method's tensors: modules trained in full, biases, embeddings."""

from __future__ import annotations

from pathlib import Path

from peftcli.adapters.audit_modules import Contents
from peftcli.adapters.base_facts import BaseFacts
from peftcli.adapters.config import HEADS, PeftConfig
from peftcli.adapters.findings import Findings
from peftcli.adapters.header import TensorInfo
from peftcli.adapters.keys import PREFIX, Key, ascii_name
from peftcli.errors import printable

EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out"})
"""Modules whose weights PEFT stores beside the adapter when tokens were added to the base."""


def check_copies(
    config: PeftConfig, contents: Contents, base: BaseFacts | None, findings: Findings, folder: Path
) -> dict[str, TensorInfo]:
    """Check every tensor that is not the method's own.

    Returns:
        Those that belong into the file, by key.
    """
    copies = {}
    saved: set[str] = set()
    heads = HEADS.get(config.task, [])
    wanted = list(getattr(config, "modules_to_save", None) or [])
    for key, tensor in contents.others:
        entry = _entry([*wanted, *heads], key.site)
        if entry is not None:
            saved.add(entry)
            _compare(key, tensor, base, findings, folder)
        elif key.site.rpartition(".")[2] in EMBEDDINGS and key.parameter == "weight":
            findings.doubt(f"is the base's own embedding, stored once more ({tensor.nbytes:,} bytes)", tensor.name)
        elif not _is_trained_bias(config, key):
            text = f"is no tensor of {config.peft_type}, and `modules_to_save` does not name it"
            findings.error(text, ascii_name(tensor.name))
            continue
        copies[tensor.name] = tensor
    for entry in wanted:  # of the heads that a task brings along, one is enough
        if entry not in saved and not (entry in heads and saved & set(heads)):
            findings.error("is in `modules_to_save`, but has no tensors in the file", entry)
    _check_biases(config, contents, findings)
    return copies


def _entry(modules_to_save: list[str], site: str) -> str | None:
    """The entry of `modules_to_save` a module is, or lies within."""
    return next((entry for entry in modules_to_save if f"{entry}." in f"{site}."), None)


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


def _is_trained_bias(config: PeftConfig, key: Key) -> bool:
    trained = getattr(config, "bias", "none") != "none"
    return trained and (key.parameter.endswith("bias") or key.site.endswith("bias"))


def _check_biases(config: PeftConfig, contents: Contents, findings: Findings) -> None:
    """Biases of adapted modules are there if they were trained (PEFT 0.13.0 lost them)."""
    bias = getattr(config, "bias", "none")
    present = {key.name for key, _ in contents.others}
    for part in contents.parts[:1] if bias != "none" else []:
        for path, option in part.fits.items():
            names = {f"{PREFIX}{path}.bias", f"{PREFIX}{path}.base_layer.bias"}
            if option.shape.has_bias and not names & present:
                findings.error(f"was trained (`bias` is {bias!r}) but is missing", min(names))
