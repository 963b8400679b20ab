"""peftcli: fine-tune models with adapters, from the command line or from Python.

The names PEFT's documentation teaches are offered here and imported when first used, so `import peftcli` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODEL = "peftcli.adapters.model"
_HOME = {
    "PeftConfig": "peftcli.adapters.config",
    "TaskType": "peftcli.adapters.config",
    "LoraConfig": "peftcli.adapters.methods.lora",
    "PeftModel": _MODEL,
    "get_peft_model": _MODEL,
}
"""Public name -> the file it lives in."""

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'peftcli' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
