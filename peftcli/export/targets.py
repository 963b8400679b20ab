"""What the programs that serve adapters make of one, read off its files: ok, fixable and how, or impossible and why.

The rules are those of the programs' own sources (vLLM's peft_helper and lora_model, SGLang's lora_config and lora,
llama.cpp's convert_lora_to_gguf and llama-adapter). The worst kind of failure is the silent one: a program that knows
one alpha / r scales modules wrongly and says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import isclose, sqrt
from pathlib import Path
from typing import Any, Literal

from peftcli.adapters.audit import PICKLE_NAME, Audit, audit_folder
from peftcli.adapters.base_facts import STORED_TRANSPOSED
from peftcli.adapters.config import CONFIG_NAME, default_of
from peftcli.adapters.registry import adapter_class
from peftcli.errors import InputErrors
from peftcli.files import read_strict_json
from peftcli.merging.source import method_name

Verdict = Literal["ok", "fixable", "impossible"]

PLAIN_TENSORS = {"lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
OLLAMA_TYPES = frozenset({"llama", "mistral", "gemma", "gemma2"})

MERGE = "peft export --to merged"
PORTABLE = "peft export --to portable"


@dataclass(frozen=True)
class Row:
    """One thing a program asks of an adapter.

    Attributes:
        what: what is asked.
        verdict: how it stands.
        note: why, and for `fixable` what to do.
    """

    what: str
    verdict: Verdict
    note: str = ""


def judge(adapter: Path, target: str, *, base: Path | None = None) -> list[Row]:
    """What a program makes of an adapter folder.

    Args:
        adapter: its folder.
        target: `transformers`, `vllm`, `sglang`, `llama.cpp` or `ollama`.
        base: the base's folder; looked for by its name otherwise.

    Raises:
        InputErrors: what is wrong with the adapter in itself.
    """
    audit = audit_folder(adapter, base=base)
    if audit.errors:
        raise InputErrors(audit.errors)
    return judge_audit(audit, target)


def judge_audit(audit: Audit, target: str) -> list[Row]:
    """The same for an adapter that has been looked at."""
    if target == "transformers":
        return [_peft_version(audit)]
    method = _method(audit)
    if method.verdict != "ok":
        return [method]  # the other questions are about LoRA's parts
    return [method, *(check(audit) for check in CHECKS[target])]


def _method(audit: Audit) -> Row:
    """Only LoRA is served anywhere."""
    config: Any = audit.config
    if audit.contents.parts and config.peft_type == "LORA" and config.variant is None:
        return Row("method", "ok", "LoRA")
    name = method_name(config)
    if not audit.contents.parts:
        return Row("method", "impossible", f"{name} is a prompt: no weights to add or merge")
    cls = adapter_class(config)
    if not cls.mergeable:
        return Row("method", "impossible", f"{name} can't be merged into weights")
    return Row("method", "fixable", f"{name}: {MERGE}, or peft export --to portable --rank N")


def _config(audit: Audit) -> Row:
    """The programs take these from the config's text; PEFT has defaults for them."""
    written = read_strict_json(audit.file.path.parent / CONFIG_NAME)
    missing = [name for name in ("r", "lora_alpha", "target_modules") if written.get(name) is None]
    if missing:
        return Row("config", "fixable", f"says no {', '.join(missing)}: {PORTABLE} writes it")
    return Row("config", "ok")


def _no_bias(audit: Audit) -> Row:
    """vLLM goes by the config, whatever the file holds."""
    bias = audit.config.bias  # type: ignore[attr-defined]
    return Row("bias", "ok") if bias == "none" else Row("bias", "fixable", f"{bias} is refused: {MERGE}, or {PORTABLE}")


def _tensors(audit: Audit) -> Row:
    names = {name for part in audit.contents.parts for found in part.modules.values() for name in found}
    extra = sorted(names - PLAIN_TENSORS)
    if extra:
        return Row("tensors", "fixable", f"{', '.join(extra)} is refused: {MERGE}")
    if audit.copies:
        return Row("tensors", "fixable", f"modules or biases trained in full are refused: {MERGE}")
    if getattr(audit.config, "target_parameters", None):
        return Row("tensors", "fixable", f"fused experts: vLLM reads them for a few models, others never: {MERGE}")
    return Row("tensors", "ok", "A and B alone")


def _layers(audit: Audit) -> Row:
    if getattr(audit.config, "layer_replication", None):
        return Row("layers", "fixable", f"replicated layers exist nowhere else: {MERGE} writes them out")
    return Row("layers", "ok")


def _file(audit: Audit) -> Row:
    if audit.file.path.name == PICKLE_NAME:
        return Row("file", "fixable", "a pickle: peft export --to peft writes safetensors")
    return Row("file", "ok", "safetensors")


def _vllm_rank(audit: Audit) -> Row:
    rank = max(_ranks(audit), default=0)
    if rank > max(VLLM_RANKS):
        return Row("rank", "fixable", f"{rank} is above {max(VLLM_RANKS)}: {PORTABLE} --rank {max(VLLM_RANKS)}")
    if rank > VLLM_DEFAULT_RANK:
        return Row("rank", "fixable", f"{rank}: vllm serve --max-lora-rank {min(r for r in VLLM_RANKS if r >= rank)}")
    return Row("rank", "ok", str(rank))


def _one_rank(audit: Audit) -> Row:
    config: Any = audit.config
    if _ranks(audit) - {config.r}:
        return Row("one rank", "fixable", f"rank_pattern is not read: {PORTABLE}")
    return Row("one rank", "ok", str(config.r))


def _scale(what: str, expected: Callable[[Audit, Any], float]) -> Callable[[Audit], Row]:
    """Whether a program's scale is the adapter's at every module."""

    def check(audit: Audit) -> Row:
        adapters = [fit.adapter for fit in audit.modules.values()]
        wrong = [a for a in adapters if not isclose(a.scaling, expected(audit, a), rel_tol=1e-6)]
        if not wrong:
            return Row("scale", "ok", what)
        count = f"{len(wrong)} of {len(adapters)}"
        note = f"would scale modules wrongly ({count}) and say nothing: it takes {what}; {PORTABLE}"
        return Row("scale", "fixable", note)

    return check


def _global(audit: Audit, adapter: Any) -> float:
    return float(audit.config.lora_alpha / audit.config.r)  # type: ignore[attr-defined]


def _global_rs(audit: Audit, adapter: Any) -> float:
    config: Any = audit.config
    return float(config.lora_alpha / (sqrt(config.r) if config.use_rslora else config.r))


def _by_tensor(audit: Audit, adapter: Any) -> float:
    config: Any = audit.config
    return float(config.lora_alpha / adapter.r)


def _gguf_modules(audit: Audit) -> Row:
    facts = audit.base
    if facts is None:
        return Row("modules", "ok", "the base is not on this machine: ties and layouts were not looked at")
    if facts.model_type in STORED_TRANSPOSED:
        return Row("modules", "impossible", f"{facts.model_type} stores weights transposed, which it refuses: {MERGE}")
    names = {fit.shape.name for fit in audit.modules.values()}
    if facts.config.get("tie_word_embeddings") and any(name.endswith(("lm_head", "embed_tokens")) for name in names):
        return Row("modules", "fixable", f"the head is tied to the embedding there: {MERGE}")
    if norms := [name for name in names if "norm" in name.rpartition(".")[2]]:
        return Row("modules", "fixable", f"{norms[0]} would be ignored: {MERGE}")
    return Row("modules", "ok")


def _vocabulary(audit: Audit) -> Row:
    """vLLM wants an adapted embedding to have as many columns as the base has tokens."""
    facts = audit.base
    for path, fit in audit.modules.items():
        held = facts.find(f"{fit.shape.name}.weight") if facts and fit.shape.kind == "embedding" else None
        a = audit.found[path].get("lora_embedding_A")
        if held is not None and a is not None and held.shape[0] != a.shape[1]:
            return Row("vocabulary", "fixable", f"{a.shape[1]} tokens, the base has {held.shape[0]}: {MERGE}")
    return Row("vocabulary", "ok")


def _ollama_base(audit: Audit) -> Row:
    kind = audit.base.model_type if audit.base else None
    if kind is None or kind in OLLAMA_TYPES:
        return Row("base", "ok", kind or "not on this machine")
    return Row(
        "base",
        "fixable",
        f"ADAPTER takes safetensors for {', '.join(sorted(OLLAMA_TYPES))} only: peft export --to gguf",
    )


def _peft_version(audit: Audit) -> Row:
    """transformers loads adapters through PEFT."""
    config: Any = audit.config
    newer = [
        (item.metadata["since"], item.name)
        for item in fields(config)
        if "since" in item.metadata and getattr(config, item.name) != default_of(item)
    ]
    if not newer:
        return Row("peft", "ok", "0.13.0 or newer")
    return Row("peft", "fixable", f"a PEFT that knows {', '.join(f'{name} ({since})' for since, name in newer)}")


def _ranks(audit: Audit) -> set[int]:
    return {int(getattr(fit.adapter, "r", 0)) for fit in audit.modules.values()}


CHECKS: dict[str, list[Callable[[Audit], Row]]] = {
    "vllm": [
        *(_file, _config, _no_bias, _tensors, _layers, _vllm_rank, _one_rank),
        _scale("one alpha / r, or / sqrt(r) for rsLoRA", _global_rs),
        _vocabulary,
    ],
    "sglang": [_file, _config, _tensors, _layers, _one_rank, _scale("one alpha / r", _global)],
    "llama.cpp": [_config, _tensors, _layers, _gguf_modules, _scale("one alpha over each module's rank", _by_tensor)],
    "ollama": [
        *(_file, _config, _tensors, _layers, _gguf_modules, _ollama_base),
        _scale("one alpha over each module's rank", _by_tensor),
    ],
}
