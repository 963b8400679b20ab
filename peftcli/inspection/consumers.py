"""What the programs that serve adapters make of one, in a line each; `peft export --target` gives the whole table."""

from __future__ import annotations

from peftcli.adapters.audit import Audit
from peftcli.export.targets import judge_audit

PROGRAMS = {"PEFT 0.13.0": "transformers", "vLLM": "vllm", "SGLang": "sglang", "llama.cpp": "llama.cpp"}


def consumer_rows(audit: Audit) -> list[tuple[str, str]]:
    """(program, verdict) for each program: `ok`, or what stands in the way."""
    return [(name, _verdict(audit, target)) for name, target in PROGRAMS.items()]


def _verdict(audit: Audit, target: str) -> str:
    reasons = [row.note for row in judge_audit(audit, target) if row.verdict != "ok"]
    return "; ".join(reasons) if reasons else "ok"
