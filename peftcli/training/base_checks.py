"""What must hold of a base model's folder before anything of it is loaded. Needs no torch, runs no code of the base."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftcli.adapters.base_facts import BaseFacts, read_base
from peftcli.adapters.config import CONFIG_NAME as ADAPTER_CONFIG
from peftcli.adapters.config import read_strict_json
from peftcli.errors import InputError, InputErrors, printable

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json", "tiktoken.model"),
)
"""Files of which a tokenizer has at least one."""

QUANTIZED_BY = ("bitsandbytes",)
"""Ways a checkpoint may be stored quantised."""


def check_base(folder: Path, *, trust_remote_code: bool = False) -> BaseFacts:
    """Read and check config, headers of the weights and the tokenizer's settings.

    What the base must not decide by itself (attention kernels, remote code, an adapter to load along) is left out with
    a warning: see `peftcli.training.model`.

    Args:
        folder: the base model's folder.
        trust_remote_code: whether the recipe allows Python code that comes with the base.

    Raises:
        InputErrors: listing what is wrong.
    """
    _require_config(folder)
    facts = read_base(folder)
    tokenizer = _tokenizer_config(folder)
    problems = [*_weight_problems(facts), *_quantization_problems(facts), *_tokenizer_problems(facts.folder)]
    if tokenizer.get("auto_map") and not trust_remote_code:
        problems.append(_needs_remote_code(folder / TOKENIZER_CONFIG, "tokenizer"))
    if problems:
        raise InputErrors(problems)
    for notice in _notices(facts):
        warnings.warn(notice, stacklevel=3)
    return facts


def whole_number(facts: BaseFacts, *names: str) -> int | None:
    """The first of some settings that the config of the language model holds as a whole number."""
    values = facts.language_config
    return next((values[name] for name in names if type(values.get(name)) is int), None)


def needs_remote_code(facts: BaseFacts) -> InputError:
    """The refusal of a model that only Python code of its own can build."""
    return _needs_remote_code(facts.folder / CONFIG, "model")


def _needs_remote_code(place: Path, what: str) -> InputError:
    return InputError(
        f"the {what} needs Python code that comes with it (remote code), which is not run",
        place=place,
        field="auto_map",
        fix="read that code, then set model.trust_remote_code: true in the recipe",
    )


def _require_config(folder: Path) -> None:
    if (folder / CONFIG).exists():
        return
    fix = None
    if (folder / ADAPTER_CONFIG).exists():
        fix = f"this is an adapter ({ADAPTER_CONFIG}): name the base it was trained on"
    elif files := sorted(folder.glob("*.gguf")):
        fix = f"name the file itself: {printable(files[0])}"
    raise InputError(f"is no base model: it has no {CONFIG}", place=folder, field="model.name_or_path", fix=fix)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG
    return read_strict_json(path) if path.exists() else {}


def _tokenizer_problems(folder: Path) -> Iterator[InputError]:
    if not any((folder / name).exists() for name in VOCABULARIES):
        yield InputError(
            "has no tokenizer", place=folder, allowed=f"one of {', '.join(VOCABULARIES)}", fix="copy it from the model"
        )


def _weight_problems(facts: BaseFacts) -> Iterator[InputError]:
    """No weights, or sizes in the config that these weights cannot have (found before a model is built from them)."""
    if not facts.tensors:
        pickles = sorted(path.name for path in facts.folder.glob("pytorch_model*.bin"))
        yield InputError(
            f"has its weights only as a pickle ({printable(pickles[0])})" if pickles else "has no weights",
            place=facts.folder,
            allowed="model.safetensors, or its shards with model.safetensors.index.json",
            fix="load it with transformers once and save it again: save_pretrained writes safetensors",
        )
        return
    place = facts.folder / CONFIG
    layers = whole_number(facts, "num_hidden_layers", "n_layer", "num_layers")
    if layers is not None and layers > len(facts.tensors):
        problem = f"is {layers:,}, but the weights are only {len(facts.tensors):,} tensors"
        yield InputError(problem, place=place, field="num_hidden_layers")
    vocabulary, width = whole_number(facts, "vocab_size"), whole_number(facts, "hidden_size", "n_embd", "d_model")
    stored = sum(tensor.nbytes for tensor in facts.tensors.values())
    # No format stores an element in less than 4 bits.
    if vocabulary and width and vocabulary * width > 2 * stored:
        problem = f"is {vocabulary:,}: an embedding of that size does not fit into {stored:,} bytes of weights"
        yield InputError(problem, place=place, field="vocab_size")


def _quantization_problems(facts: BaseFacts) -> Iterator[InputError]:
    settings = facts.config.get("quantization_config")
    if settings is None:
        return
    place, field = facts.folder / CONFIG, "quantization_config"
    if not isinstance(settings, dict):
        yield InputError("is no object", place=place, field=field)
        return
    by_bitsandbytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    method = settings.get("quant_method", "bitsandbytes" if by_bitsandbytes else None)
    if method not in QUANTIZED_BY:
        yield InputError(
            f"the weights are quantised by {printable(repr(method))}, which can't be trained on here",
            place=place,
            field=f"{field}.quant_method",
            allowed=", ".join(QUANTIZED_BY),
            fix="use the unquantised base; the recipe's quantization section quantises it while loading",
        )


def _notices(facts: BaseFacts) -> Iterator[str]:
    """What is ignored, in words."""
    config = facts.folder / CONFIG
    if kernels := sorted(key for key in facts.config if "attn_implementation" in key):
        yield f"{config}: `{printable(kernels[0])}` is ignored; the recipe chooses the attention kernel"
    if (facts.folder / ADAPTER_CONFIG).exists():
        yield f"{facts.folder / ADAPTER_CONFIG}: an adapter inside the base's folder is ignored"
