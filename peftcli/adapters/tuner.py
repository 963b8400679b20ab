"""`Tuner`: what PEFT calls `model.base_model`. It holds the user's model (`model`) and speaks PEFT's names for the engine.

PEFT has a class of them for each method (`LoraModel`); here they differ in nothing but their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters.attach import attach
from peftcli.adapters.config import PeftConfig
from peftcli.adapters.engine import Attached, attached_to
from peftcli.adapters.gate import Gate, attach_gate
from peftcli.adapters.methods.xlora import XLoraConfig
from peftcli.adapters.registry import METHODS
from peftcli.adapters.steps import add_regularization, after_step
from peftcli.adapters.weighted import Svd, add_weighted_ia3, add_weighted_lora
from peftcli.errors import InputError
from peftcli.merging.operators import SignMethod


class Tuner(nn.Module):
    """The adapters of one model, and the model (`model`).

    Args:
        model: the base; changed in place.
        peft_config: config of the first adapter; None attaches nothing yet.
        adapter_name: its name.
        options: as for `attach`.
    """

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig | None = None, adapter_name: str = "default", **options: Any
    ) -> None:
        super().__init__()
        self.model = model
        if peft_config is not None:
            self.attach(peft_config, adapter_name, **options)

    @property
    def attached(self) -> Attached:
        attached = attached_to(self.model)
        if attached is None:
            raise InputError("the adapters of this model were unloaded")
        return attached

    def attach(self, config: PeftConfig, name: str, **options: Any) -> None:
        if isinstance(config, XLoraConfig):
            self.internal_xlora_classifier = attach_gate(self.model, config, name, **options).gates[name]
        else:
            attach(self.model, config, name, **options)
        self._adopt_shared()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        if self.training and isinstance(getattr(output, "loss", None), Tensor):
            output.loss = add_regularization(self.attached, output.loss)
        return output

    def update_and_allocate(self, global_step: int) -> None:
        """AdaLoRA's allocation of ranks; call it after `optimizer.step()` and before `zero_grad()`, counting from 1.

        Our own training loop does; in another one that is the caller's task.
        """
        after_step(self.attached, global_step)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            gate = self._modules.get("internal_xlora_classifier")
            return getattr(gate if gate is not None and name in Gate.PUBLIC else self.model, name)

    # PEFT's names for what the engine knows and does
    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.attached.own_configs()

    @property
    def prefix(self) -> str:
        """What the names of the method's tensors start with, e.g. `lora_`."""
        return next(iter(self.attached.configs.values())).prefix

    @property
    def active_adapters(self) -> list[str]:
        return self.attached.active

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the names where there are several."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else self.active_adapters

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the adapted modules in the user's model."""
        return [path for path, _ in self.attached.layers()]

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train adapters, or no longer; which ones are active stays."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.attached.set_requires_grad(name, requires_grad)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters (the active ones by default) into the base weights in place."""
        self.attached.merge(adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Bring the base weights back, bit for bit."""
        self.attached.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The user's model with the adapters folded in and nothing of ours left."""
        return self.attached.unload(merge=True, names=adapter_names, safe_merge=safe_merge)

    def unload(self) -> nn.Module:
        """The user's model as it was, without adapters."""
        return self.attached.unload(merge=False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter without a trace."""
        self.attached.delete(adapter_name)
        for key, bank in self.attached.shared.items():
            if not len(bank):
                self._modules.pop(key, None)
        if not self.attached.gates:
            self._modules.pop("internal_xlora_classifier", None)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several composed, the active ones."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.attached.set_active(names, trainable=not inference_mode)

    def enable_adapter_layers(self) -> None:
        self.attached.wake()

    def disable_adapter_layers(self) -> None:
        self.attached.sleep()

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: SignMethod = "total",
    ) -> None:
        """Add a frozen adapter that combines others: LoRA by any combination type, IA3 by the weighted sum of vectors.

        `svd_full_matrices` is accepted and not used: the truncated factors are the same without the full matrices.
        """
        kinds = {self.attached.configs[name].peft_type for name in adapters if name in self.attached.configs}
        if kinds <= {"LORA"}:
            svd = Svd(svd_rank, svd_clamp, svd_driver)
            add_weighted_lora(
                self.attached, adapters, weights, adapter_name, combination_type, svd, density, majority_sign_method
            )
        elif kinds == {"IA3"}:
            add_weighted_ia3(self.attached, adapters, weights, adapter_name)
        else:
            raise InputError(f"{', '.join(sorted(kinds))} adapters can't be combined", allowed="LORA, IA3")
        self._adopt_shared()

    def _adopt_shared(self) -> None:
        """Register tensors kept once a model where PEFT has them (`base_model.vera_A`)."""
        for key, bank in self.attached.shared.items():
            if "." not in key:  # parts of a list are registered by the layers
                self.add_module(key, bank)


BaseTuner = Tuner
"""PEFT's name, for `isinstance`."""


@cache
def tuner_class(peft_type: str) -> type[Tuner]:
    """A method's class of tuners under PEFT's name, e.g. `LoraModel`."""
    doc = f"{peft_type} adapters of one model, and the model (`model`)."
    return type(METHODS[peft_type].tuner, (Tuner,), {"__doc__": doc, "__module__": "peftcli"})
