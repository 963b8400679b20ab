"""Modules and biases trained in full beside an adapter: `modules_to_save`, LN tuning, `bias="all" | "lora_only"`.

The family of copies: y = copy(x). The base keeps its own tensors, so switching the adapter off gives the base back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch  # noqa: TID253
from torch import nn  # noqa: TID253

from peftcli.adapters.base import CopyNames
from peftcli.adapters.context import BASE, ForwardContext
from peftcli.adapters.quantized import is_quantized
from peftcli.errors import InputError

ROW_WISE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.GroupNorm)
"""Modules whose output row i depends on input row i alone, so that rows of different adapters may share a batch."""

MODULES_TO_SAVE = CopyNames(
    "original_module", "modules_to_save", saved="", what="modules_to_save", wrapper="ModulesToSaveWrapper"
)


class CopyLayer(nn.Module):
    """A module with one trained copy an adapter; the active adapter's copy answers.

    Args:
        module: the module as it stands in the base model.
        context: facts about the running batch, shared by all layers of a model.
        names: what PEFT calls the parts.
    """

    def __init__(self, module: nn.Module, context: ForwardContext, names: CopyNames = MODULES_TO_SAVE) -> None:
        super().__init__()
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
            raise InputError(f"{names.what} cannot be applied to modules of type {type(module).__name__}")
        if any(is_quantized(part) for part in module.modules()):
            raise InputError(f"{names.what} cannot be applied to quantised modules")
        self.names = names
        self.add_module(names.original, module)
        self.add_module(names.copies, nn.ModuleDict())
        self.context = context
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.disable_adapters = False
        self.train(module.training)

    def _get_name(self) -> str:
        """The first word of `repr`: PEFT's name of the wrapper."""
        return self.names.wrapper

    @property
    def original(self) -> nn.Module:
        module = self._modules[self.names.original]
        assert module is not None
        return module

    @property
    def copies(self) -> nn.ModuleDict:
        copies = self._modules[self.names.copies]
        assert isinstance(copies, nn.ModuleDict)
        return copies

    def add(self, name: str, *, dtype: torch.dtype | None = None) -> None:
        """Give an adapter its own trainable copy, in `dtype` where the module's floating tensors are to be cast."""
        twin = copy.deepcopy(self.original)
        twin.requires_grad_(True)
        self.copies[name] = twin if dtype is None else twin.to(dtype)

    def remove(self, name: str) -> None:
        del self.copies[name]
        if name in self.active_adapters:
            self.active_adapters.remove(name)

    def check_active(self, names: list[str], place: str) -> None:
        """Refuse several copies at once where the copies are the adapter: which one should answer?"""
        held = [name for name in names if name in self.copies]
        if len(held) > 1 and self.names is not MODULES_TO_SAVE:
            raise InputError(f"{self.names.what} does not allow more than one active adapter at a time", place=place)

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    @property
    def active(self) -> nn.Module:
        """The module that answers now."""
        names = [name for name in self.merged_adapters or self.active_adapters if name in self.copies]
        return self.original if self.disable_adapters or not names else self.copies[names[0]]

    def merge(self, names: list[str]) -> None:
        """Let the copy of the first of `names` answer until `unmerge`, whichever adapter is active."""
        self.merged_adapters += [name for name in names if name in self.copies and name not in self.merged_adapters]

    def unmerge(self) -> None:
        self.merged_adapters.clear()

    def final(self) -> nn.Module:
        """The module to leave in the layer's place: the one that answers, in the original's precision."""
        module = self.active
        have = {name: p.dtype for name, p in self.original.named_parameters()}
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(have[name])
        return module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.context.adapter_names is None or self.disable_adapters:
            return self._cast_call(self.active, *args, **kwargs)
        return self._forward_mixed(*args, **kwargs)

    def _cast_call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the copy in its own precision and come back to the original's."""
        if module is self.original:
            return module(*args, **kwargs)
        have = next((p.dtype for p in self.original.parameters()), None)
        want = next((p.dtype for p in module.parameters()), None)
        if have == want or want is None or have is None:
            return module(*args, **kwargs)
        args = tuple(a.to(want) if torch.is_tensor(a) and a.is_floating_point() else a for a in args)
        output = module(*args, **kwargs)
        return output.to(have) if torch.is_tensor(output) else output

    def _forward_mixed(self, *args: Any, **kwargs: Any) -> Any:
        kind = type(self.original).__name__
        if not isinstance(self.original, ROW_WISE) and not kind.endswith(("RMSNorm", "LayerNorm")):
            raise InputError(f"Mixed batching is not supported for {kind} in {self.names.what}")
        x = args[0]
        output = self.original(*args, **kwargs)
        for name, rows in self.context.rows_by_adapter(x.shape[0]).items():
            if name != BASE and name in self.copies:
                index = torch.tensor(rows, device=x.device)
                answer = self._cast_call(self.copies[name], x.index_select(0, index), *args[1:], **kwargs)
                output = output.index_copy(0, index, answer)
        return output

    def __getattr__(self, name: str) -> Any:
        """Attributes of the module that answers, e.g. `weight` of an embedding."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "names" not in self.__dict__ or name in (self.names.original, self.names.copies):
                raise
            return getattr(self.active, name)


AuxiliaryTrainingWrapper = ModulesToSaveWrapper = CopyLayer
"""PEFT's names, for `isinstance`."""


class TrainedBiases:
    """The biases one adapter trains. Its parameters take the base's places while it is active.

    Args:
        owners: (module, parameter name) of each bias.
    """

    def __init__(self, owners: list[tuple[nn.Module, str]]) -> None:
        self.owners = owners
        self.originals = [module._parameters[name] for module, name in owners]
        self.trained = [
            nn.Parameter(torch.clone(original.detach())) for original in self.originals if original is not None
        ]

    def switch(self, on: bool) -> None:
        """Put the trained biases (True) or the base's (False) in place."""
        for (module, name), original, trained in zip(self.owners, self.originals, self.trained, strict=True):
            if any(module._parameters[name] is known for known in (original, trained)):  # else it is merged
                module._parameters[name] = trained if on else original

    def add(self, owners: list[tuple[nn.Module, str]]) -> None:
        """Train more biases, and switch them as the others are."""
        more = TrainedBiases(owners)
        for trained, (module, name) in zip(more.trained, owners, strict=True):
            trained.requires_grad_(any(bias.requires_grad for bias in self.trained) or not self.trained)
            module._parameters[name] = trained
        self.owners, self.originals = self.owners + more.owners, self.originals + more.originals
        self.trained = self.trained + more.trained


def trained_bias_owners(
    modules: Iterable[tuple[str, nn.Module]], mode: str, adapted: set[nn.Module]
) -> list[tuple[nn.Module, str]]:
    """The parameters that `bias=mode` trains: every bias of the model (`all`) or those of adapted modules (`lora_only`).

    Args:
        modules: (path, module) of the base model's modules.
        mode: `all`, or `<method>_only`.
        adapted: the modules an adapter sits on.
    """
    return [
        (module, "bias")
        for _, module in modules
        if module._parameters.get("bias") is not None and (mode == "all" or module in adapted)
    ]


def is_bias_by_name(path: str, name: str) -> bool:
    """What PEFT 0.13 takes for a bias too: `in_proj_bias`, or a table that is one (T5's `relative_attention_bias.weight`)."""
    return name.endswith("bias") or path.rpartition(".")[2].endswith("bias")
