"""The methods, one line each: PEFT's name, the file, the config class and the adapter class. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from peftcli.errors import InputError, nearest, printable

if TYPE_CHECKING:
    from peftcli.adapters.base import Adapter
    from peftcli.adapters.config import PeftConfig
    from peftcli.adapters.prompt_base import PromptMethod


@dataclass(frozen=True)
class Method:
    """Where a method lives."""

    file: str
    config: str
    adapter: str

    @property
    def tuner(self) -> str:
        """PEFT's name of the class a model with such adapters has as `base_model`."""
        return self.config.removesuffix("Config") + "Model"


METHODS: dict[str, Method] = {
    "LORA": Method("lora", "LoraConfig", "Lora"),
    "IA3": Method("ia3", "IA3Config", "Ia3"),
    "OFT": Method("oft", "OFTConfig", "Oft"),
    "BOFT": Method("boft", "BOFTConfig", "Boft"),
    "HRA": Method("hra", "HRAConfig", "Hra"),
    "LN_TUNING": Method("ln_tuning", "LNTuningConfig", "LnTuning"),
    "ROAD": Method("road", "RoadConfig", "Road"),
    "POLY": Method("poly", "PolyConfig", "Poly"),
    "TRAINABLE_TOKENS": Method("trainable_tokens", "TrainableTokensConfig", "TrainableTokens"),
    "PROMPT_TUNING": Method("prompt_tuning", "PromptTuningConfig", "PromptTuning"),
    "MULTITASK_PROMPT_TUNING": Method(
        "multitask_prompt_tuning", "MultitaskPromptTuningConfig", "MultitaskPromptTuning"
    ),
    "P_TUNING": Method("p_tuning", "PromptEncoderConfig", "PTuning"),
    "ADAMSS": Method("adamss", "AdamssConfig", "Adamss"),
    "FROD": Method("frod", "FrodConfig", "Frod"),
    "OSF": Method("osf", "OSFConfig", "Osf"),
    "CPT": Method("cpt", "CPTConfig", "Cpt"),
    "CARTRIDGE": Method("cartridge", "CartridgeConfig", "Cartridge"),
    "PREFIX_TUNING": Method("prefix_tuning", "PrefixTuningConfig", "PrefixTuning"),
    "ADAPTION_PROMPT": Method("adaption_prompt", "AdaptionPromptConfig", "AdaptionPrompt"),
    "LOHA": Method("loha", "LoHaConfig", "LoHa"),
    "LOKR": Method("lokr", "LoKrConfig", "LoKr"),
    "VERA": Method("vera", "VeraConfig", "Vera"),
    "ADALORA": Method("adalora", "AdaLoraConfig", "AdaLora"),
    "RANDLORA": Method("randlora", "RandLoraConfig", "RandLora"),
    "C3A": Method("c3a", "C3AConfig", "C3A"),
    "GRALORA": Method("gralora", "GraloraConfig", "Gralora"),
    "DELORA": Method("delora", "DeloraConfig", "Delora"),
    "SHIRA": Method("shira", "ShiraConfig", "Shira"),
    "MISS": Method("miss", "MissConfig", "Miss"),
    "HIRA": Method("hira", "HiraConfig", "Hira"),
    "VBLORA": Method("vblora", "VBLoRAConfig", "VBLoRA"),
    "XLORA": Method("xlora", "XLoraConfig", "XLora"),
    "FOURIERFT": Method("fourierft", "FourierFTConfig", "FourierFT"),
    "UNILORA": Method("unilora", "UniLoraConfig", "UniLora"),
    "LILY": Method("lily", "LilyConfig", "Lily"),
    "TINYLORA": Method("tinylora", "TinyLoraConfig", "TinyLora"),
    "WAVEFT": Method("waveft", "WaveFTConfig", "WaveFT"),
    "PVERA": Method("pvera", "PveraConfig", "Pvera"),
    "BEFT": Method("beft", "BeftConfig", "Beft"),
    "SUPERTUNING": Method("supertuning", "SupertuningConfig", "Supertuning"),
    "DEFT": Method("deft", "DeftConfig", "Deft"),
    "GLORA": Method("glora", "GloraConfig", "Glora"),
    "PSOFT": Method("psoft", "PsoftConfig", "Psoft"),
    "PEANUT": Method("peanut", "PeanutConfig", "Peanut"),
}


PeftType = Enum("PeftType", {name: name for name in METHODS}, type=str)  # type: ignore[misc]  # one source of names
"""PEFT's enumeration of method names."""


def method_names() -> list[str]:
    """The names a recipe's `adapter.method` may have (PEFT's types in lower case)."""
    return [name.lower() for name in METHODS]


def config_class(peft_type: str, *, place: str | Path | None = None) -> type[PeftConfig]:
    """The config class of a method, e.g. `LoraConfig` for LORA. Any letter case is understood in recipes' names only.

    Raises:
        InputError: if no method has that name.
    """
    method = _entry(peft_type, place)
    return getattr(import_module(f"peftcli.adapters.methods.{method.file}"), method.config)


def config_named(name: str) -> type[PeftConfig] | None:
    """The config class of that name, e.g. `LoraConfig`."""
    found = [method for method in METHODS.values() if method.config == name]
    return getattr(import_module(f"peftcli.adapters.methods.{found[0].file}"), name) if found else None


def tuner_type(name: str) -> str | None:
    """The method whose tuner has that name, e.g. LORA for `LoraModel`. Prompts have none."""
    found = [peft_type for peft_type, method in METHODS.items() if method.tuner == name]
    return found[0] if found and not config_class(found[0]).is_prompt_learning else None


def adapter_class(config: PeftConfig) -> type[Adapter]:
    """The class that states the tensors and equation a config asks for, e.g. `Lora`, or `Dora` with `use_dora`."""
    return adapter_class_of(config.adapter_variant() or _entry(config.peft_type, None))


def adapter_class_of(method: Method) -> type[Adapter]:
    """The adapter class an entry names."""
    return getattr(import_module(f"peftcli.adapters.methods.{method.file}"), method.adapter)


def needs_rows(config: PeftConfig) -> bool:
    """Whether the method must see which row of a batch a token is in, so that rows can't hold several samples."""
    if config.is_prompt_learning or config.peft_type == "XLORA":  # virtual tokens a row; a gate that runs rows twice
        return True
    method = adapter_class(config)
    return method.needs_rows or method.rows_interact


def prompt_class(config: PeftConfig) -> type[PromptMethod]:
    """The class that states the prompt a config asks for, e.g. `PromptTuning`."""
    method = _entry(config.peft_type, None)
    return getattr(import_module(f"peftcli.adapters.methods.{method.file}"), method.adapter)


def _entry(peft_type: str, place: str | Path | None) -> Method:
    if peft_type not in METHODS:
        raise InputError(
            f"unknown method {printable(peft_type)!r}",
            place=place,
            field="peft_type",
            allowed=", ".join(METHODS),
            fix=str(nearest(peft_type.upper(), METHODS)) or None,
        )
    return METHODS[peft_type]
