"""What the programs that serve adapters make of one: accepted, refused, or, worst, taken with another meaning.

Facts about vLLM, llama.cpp and PEFT 0.13.0, each read from their source; hints, not a test: `peft export --target` checks.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from peftcli.adapters.audit import Audit
from peftcli.adapters.config import PeftConfig

VLLM_DEFAULT_RANK = 16
PLAIN_TENSORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")


def consumer_rows(audit: Audit) -> list[tuple[str, str]]:
    """(program, verdict) for each program."""
    return [
        ("PEFT 0.13.0", _old_peft(audit.config)),
        ("vLLM", _verdict(_extras(audit) + _vllm(audit))),
        ("llama.cpp", _verdict(_extras(audit) + _llama_cpp(audit))),
    ]


def _verdict(reasons: list[str]) -> str:
    return "; ".join(reasons) if reasons else "ok"


def _old_peft(config: PeftConfig) -> str:
    newer = [
        f"{item.name} ({item.metadata['since']})"
        for item in fields(config)
        if "since" in item.metadata and getattr(config, item.name) != _default(item)
    ]
    return f"refuses newer fields: {', '.join(newer)}" if newer else "ok"


def _default(item: Any) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _extras(audit: Audit) -> list[str]:
    """What neither vLLM nor llama.cpp takes."""
    if audit.config.peft_type != "LORA":
        return [f"refuses {audit.config.peft_type}: export it as LoRA or merge it"]
    names = {name for found in audit.found.values() for name in found}
    reasons = [f"refuses the tensor {name}" for name in sorted(names - set(PLAIN_TENSORS))]
    if audit.copies:
        reasons.append("refuses modules and biases trained in full")
    return reasons


def _vllm(audit: Audit) -> list[str]:
    ranks = {getattr(fit.adapter, "r", 0) for fit in audit.modules.values()}
    reasons = []
    if max(ranks, default=0) > VLLM_DEFAULT_RANK:
        reasons.append(f"needs --max-lora-rank {max(ranks)}")
    if _scalings(audit) != {_global_scaling(audit.config, root=bool(getattr(audit.config, "use_rslora", False)))}:
        reasons.append("would scale modules wrongly: it knows one alpha / r")
    return reasons


def _llama_cpp(audit: Audit) -> list[str]:
    """It scales each module by the one alpha over the module's own rank."""
    alpha = getattr(audit.config, "lora_alpha", 0)
    wrong = [
        path
        for path, fit in audit.modules.items()
        if abs(fit.adapter.scaling - alpha / getattr(fit.adapter, "r", 1)) > 1e-9
    ]
    return ["would scale modules wrongly: it knows neither rsLoRA nor alpha_pattern"] if wrong else []


def _scalings(audit: Audit) -> set[float]:
    return {round(float(fit.adapter.scaling), 9) for fit in audit.modules.values()}


def _global_scaling(config: PeftConfig, *, root: bool) -> float:
    r = getattr(config, "r", 0) or 1
    return round(float(getattr(config, "lora_alpha", 0)) / (r**0.5 if root else r), 9)
