"""Secrets taken out of everything that is shown or saved: tokens by their known shapes, passwords out of addresses."""

from __future__ import annotations

import re

HIDDEN = "***"

# Repetitions are bounded, so that hostile text costs linear time.
_TOKEN = re.compile(
    r"\b(hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abprs]-|AKIA|wandb_v1_)[A-Za-z0-9_-]{12,}"  # the issuers' prefixes
    r"|\bey[JK][\w-]{8,2000}\.[\w-]{8,2000}\.[\w-]{8,2000}"  # a JSON web token
)
_PASSWORD_IN_ADDRESS = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]{0,20}://)[^/\s@]{1,500}@")
_NAMED = re.compile(
    r"(?i)((?:token|password|passwd|secret|api[_-]?key|access[_-]?key)[\"']?\s?[=:]\s?)"
    r"(?!unknown field)[^\s\"'&,}]{6,}"  # but our own word on a field of that name
)


def redact(text: str) -> str:
    """`text` with everything that looks like a secret replaced by `***`."""
    text = _TOKEN.sub(HIDDEN, text)
    text = _PASSWORD_IN_ADDRESS.sub(rf"\g<1>{HIDDEN}@", text)
    return _NAMED.sub(rf"\g<1>{HIDDEN}", text)
