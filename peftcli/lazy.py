"""Heavy modules that are imported at first use, so that importing our own files stays cheap.

`from peftcli.lazy import torch` gives the real module to type checkers and, at run time, a stand-in that imports torch
when its first attribute is read. Method files and configs can therefore be read by `peft inspect` and `peft train
--check` in milliseconds. A class statement that inherits from `torch.nn.Module` does read an attribute: files with
such classes import torch the ordinary way and are themselves imported late.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class LazyModule(ModuleType):
    """A module that is imported when its first attribute is read."""

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # introspection (inspect, doctest, pickle) must not trigger the import
            raise AttributeError(attribute)
        value = getattr(importlib.import_module(self.__name__), attribute)
        setattr(self, attribute, value)  # found without this call next time
        return value


if TYPE_CHECKING:
    import numpy
    import torch
    import torch.nn.functional as functional
else:
    numpy = LazyModule("numpy")
    torch = LazyModule("torch")
    functional = LazyModule("torch.nn.functional")

__all__ = ["functional", "numpy", "torch"]
