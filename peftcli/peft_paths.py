"""The paths PEFT's users import from: `peftcli.tuners.lora`, `peftcli.utils.save_and_load` and the like.

PEFT has a file for each; ours are elsewhere, so these modules are made when they are imported. Each offers every public
name of `peftcli`, and those few that PEFT has below its top only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


@cache
def paths() -> frozenset[str]:
    """PEFT's modules that hold something a user imports, without `peft.`."""
    from peftcli.adapters.registry import METHODS

    methods = [f"tuners.{method.file}" for method in METHODS.values()]
    return frozenset(
        {
            *("auto", "config", "functional", "helpers", "mapping", "mapping_func", "mixed_model", "peft_model"),
            *("tuners", "tuners.tuners_utils", "tuners.mixed", *methods),
            *(f"{method}.{part}" for method in methods for part in ("config", "layer", "model")),
            *(f"tuners.lora.{part}" for part in ("conversion", "corda", "eva", "loraga")),
            *("utils", "utils.constants", "utils.error", "utils.hotswap", "utils.loftq_utils", "utils.other"),
            *("utils.peft_types", "utils.save_and_load", "utils.warning"),
        }
    )


BELOW = {
    "AuxiliaryTrainingWrapper": "copies",
    "BaseTuner": "tuner",
    "CONFIG_NAME": "config",
    "DUMMY_TARGET_MODULES": "targets",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND": "targets",
    "LoraLayer": "layer_names",
    "ModulesToSaveWrapper": "copies",
    "PEFT_TYPE_TO_PREFIX_MAPPING": "mappings",
    "SAFETENSORS_WEIGHTS_NAME": "checkpoint",
    "TunerLayerStatus": "status",
    "TunerModelStatus": "status",
    "WEIGHTS_NAME": "checkpoint",
    "_get_submodules": "helpers",
    "infer_device": "helpers",
    "transpose": "helpers",
}
"""Names PEFT has in such a module but not at its top, and the file in `peftcli/adapters` they live in."""

RENAMED = {"WEIGHTS_NAME": "PICKLE_NAME", "SAFETENSORS_WEIGHTS_NAME": "WEIGHTS_NAME"}


class PeftPaths(MetaPathFinder, Loader):
    """Finds and makes the modules of `paths()`."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        known = name.startswith("peftcli.") and name.removeprefix("peftcli.") in paths()
        return ModuleSpec(name, self, is_package=True) if known else None

    def exec_module(self, module: ModuleType) -> None:
        def look_up(name: str) -> Any:
            below = f"{module.__name__}.{name}"
            if below.removeprefix("peftcli.") in paths():
                return import_module(below)
            if name in BELOW:
                file = import_module(f"peftcli.adapters.{BELOW[name]}")
                return getattr(file, RENAMED.get(name, name))
            if name.startswith("__"):
                raise AttributeError(name)
            try:
                return getattr(import_module("peftcli"), name)
            except AttributeError as error:
                raise AttributeError(f"module {module.__name__!r}: {error}") from None

        module.__dict__["__getattr__"] = look_up


def install() -> None:
    """Let Python find these modules from now on."""
    if not any(isinstance(finder, PeftPaths) for finder in sys.meta_path):
        sys.meta_path.append(PeftPaths())
