"""`PeftMixedModel`: adapters of different methods on one model, several active at once.

The engine composes any methods as functions, the first named outermost; this class only offers PEFT's narrower face.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftcli.adapters.config import PeftConfig
from peftcli.adapters.model import PeftModel
from peftcli.adapters.tuner import Tuner
from peftcli.errors import InputError

COMPATIBLE = frozenset({"ADALORA", "HIRA", "IA3", "LOHA", "LOKR", "LORA", "OFT", "ROAD", "SHIRA"})
"""Methods PEFT mixes in 0.13 or today."""


class MixedModel(Tuner):
    """What PEFT calls the `base_model` of one."""


class PeftMixedModel(PeftModel):
    """A model whose adapters need not be of one method."""

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **options: Any) -> None:
        """Attach another adapter, of any compatible method."""
        if peft_config.peft_type not in COMPATIBLE:
            raise InputError(
                f"The provided `peft_type` '{peft_config.peft_type}' is not compatible with the `PeftMixedModel`.",
                allowed=", ".join(sorted(COMPATIBLE)),
            )
        super().add_adapter(adapter_name, peft_config, *args, **options)

    def _check_same_method(self, peft_config: PeftConfig) -> None:
        """Methods may differ here."""

    @classmethod
    def tuner_for(cls, peft_config: PeftConfig) -> type[Tuner]:
        return MixedModel

    @property
    def active_adapter(self) -> list[str]:  # type: ignore[override]
        """The active adapters: one alone or several."""
        return self.active_adapters

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapters[0]]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several composed, the active ones."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if unknown := sorted(set(names) - set(self.peft_config)):
            raise InputError(
                f"Adapter(s) {unknown} not found, available adapters: {sorted(self.peft_config)}", field="adapter_name"
            )
        super().set_adapter(names, inference_mode)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused, as in PEFT: a folder's config names one method."""
        raise NotImplementedError("Saving is not supported for mixed models (yet).")

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Refused, as in PEFT."""
        raise NotImplementedError("Model card creation is not supported for mixed models (yet).")

    @classmethod
    def class_for(cls, config: PeftConfig) -> type[PeftModel]:
        return cls
