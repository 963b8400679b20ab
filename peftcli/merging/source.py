"""An adapter's files as updates: one module at a time, without a model."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peftcli.adapters.audit import Audit, audit_folder
from peftcli.adapters.audit_modules import Part
from peftcli.adapters.base import Adapter, DeltaAdapter, LowRankAdapter, SiteShape, Tensors, fill
from peftcli.adapters.fingerprint import check_fingerprint
from peftcli.adapters.header import TensorInfo
from peftcli.adapters.keys import PREFIX
from peftcli.adapters.methods.lora import Lora
from peftcli.adapters.registry import adapter_class
from peftcli.adapters.values import read_array
from peftcli.errors import InputError, InputErrors, printable
from peftcli.files import open_regular, sha256
from peftcli.lazy import numpy, torch
from peftcli.merging.algebra import Dense, LowRank, Update
from peftcli.merging.base_weights import BaseWeights
from peftcli.merging.tensors import read_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

REPEATED = re.compile(r"\.(modules_to_save|original_module)\.")
"""In the keys of biases PEFT stores once more when all biases are trained, and of the replaced ones, which do nothing."""

FACTORS = ("lora_A.weight", "lora_B.weight")

USUAL_RANK = 16
"""Given to the update of a method that has no rank."""


class Source:
    """An adapter folder, checked and opened.

    Args:
        folder: holds the adapter.
        base: the base model, for methods whose update depends on it.

    Raises:
        InputErrors: what `peft inspect --check` finds wrong with it.
    """

    def __init__(self, folder: Path, base: BaseWeights | None = None) -> None:
        self.folder, self.base = folder, base
        self.audit: Audit = audit_folder(folder, base=base.folder if base else None)
        if self.audit.errors:
            raise self.audit.errors[0] if len(self.audit.errors) == 1 else InputErrors(self.audit.errors)
        if base is not None:
            check_fingerprint(folder, base.fingerprint())
        self.config: Any = self.audit.config
        if self.part and adapter_class(self.part.config).knows_neighbours:
            raise InputError(
                f"what {self.what} does depends on the order of the model's modules, so files alone can't be merged",
                place=folder,
                fix="load it into the model: PeftModel.from_pretrained(...).merge_and_unload()",
            )
        self.name = folder.resolve().name

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights' file: what a card names a parent by."""
        return sha256(self.audit.file.path)

    @property
    def part(self) -> Part | None:
        """The method's own tensors; None for a prompt."""
        return self.audit.contents.parts[0] if self.audit.contents.parts else None

    @property
    def companions(self) -> list[Part]:
        """What else the adapter does at modules of their own: trainable tokens."""
        return [part for part in self.audit.contents.parts[1:] if part.modules]

    @cached_property
    def paths(self) -> dict[str, str]:
        """Each adapted module's path in the base, and its path in the file."""
        return {fit.shape.name: path for path, fit in self.part.fits.items()} if self.part else {}

    @property
    def copies(self) -> dict[str, TensorInfo]:
        """Tensors of modules and biases trained in full, by their name in the base."""
        own = {key.removeprefix(PREFIX): info for key, info in self.audit.copies.items()}
        kept = {
            key: info for key, info in own.items() if not (REPEATED.search(key) or self._is_base_embedding(key, info))
        }
        return {key.replace(".base_layer.", "."): info for key, info in kept.items()}

    def _is_base_embedding(self, key: str, info: TensorInfo) -> bool:
        """Whether a tensor is an adapted embedding's own weight, which PEFT stores beside the adapter, unchanged."""
        if not key.endswith(".base_layer.weight") or self.audit.base is None:
            return False
        original = self.audit.base.find(key.replace(".base_layer.", "."))
        return original is not None and original.shape == info.shape

    def array(self, info: TensorInfo) -> NDArray[Any]:
        """One of its tensors as float32, without torch."""
        with open_regular(self.audit.file.path) as file:
            return read_array(file, info)

    def read(self, info: TensorInfo) -> Tensor:
        """One of its tensors as it is stored."""
        return read_tensor(self.audit.file.path, info)

    def adapter(self, module: str) -> Adapter:
        """The method at a module, able to read the base weight."""
        assert self.part is not None
        fit = self.part.fits[self.paths[module]]
        shape = fit.shape
        return type(fit.adapter)(
            fit.adapter.config, shape, lambda: self.base_weight(shape), lambda: self.base_bias(shape)
        )

    def base_weight(self, shape: SiteShape) -> Tensor:
        """The base's weight [out, in] at a module."""
        if self.base is None:
            raise InputError(
                f"what {self.what} does at {shape.name} depends on the base's weight",
                place=self.folder,
                fix="name the base: --base FOLDER",
            )
        return self.base.matrix(shape)

    def base_bias(self, shape: SiteShape) -> Tensor | None:
        """The base's bias [out] at a module, where it has one."""
        name = f"{shape.name}.{'in_proj_bias' if shape.kind == 'attention' else 'bias'}"
        return self.base.tensor(name).float() if self.base and shape.has_bias else None

    @property
    def what(self) -> str:
        """The method, as a message names it."""
        return method_name(self.config)

    @property
    def starts_from_quantized(self) -> bool:
        """Whether the base was replaced by a quantised one when the adapter was made (LoftQ)."""
        return getattr(self.config, "init_lora_weights", None) == "loftq"

    @cached_property
    def shared(self) -> dict[str, Tensor]:
        """Tensors kept once a model: read, or made again from their seed."""
        assert self.part is not None
        adapters = [self.adapter(module) for module in self.paths]
        specs = {key: spec for adapter in adapters for key, spec in adapter.tensors().items() if spec.shared}
        missing = specs.keys() - self.part.shared.keys()
        made = type(adapters[0]).make_shared(adapters, self.config) if missing else {}
        tensors = {}
        for key, spec in specs.items():
            if key in self.part.shared:
                tensors[key] = _float(self.read(self.part.shared[key]))
            elif key in made:
                tensors[key] = made[key]
            else:
                tensors[key] = torch.empty(spec.shape)
                fill(tensors[key], spec.init)
        return tensors

    def tensors(self, module: str, adapter: Adapter) -> Tensors:
        """The adapter's tensors at a module as its equation wants them, in float32."""
        assert self.part is not None
        return self.tensors_at(self.part, self.paths[module], adapter)

    def tensors_at(self, part: Part, path: str, adapter: Adapter) -> Tensors:
        """The same for either part of the file, by the module's path there."""
        held = {name: _float(self.read(info)) for name, info in part.modules[path].items()}
        return loaded(adapter, held, self.shared if _has_shared(adapter) else {})

    def updates(self, module: str) -> list[Update]:
        """What the adapter adds to each matrix of a parameter that holds experts in one; elsewhere `update` alone."""
        updates: list[Update]
        with numpy.errstate(over="ignore", invalid="ignore"):  # told below
            if self.adapter(module).shape.kind == "parameter":
                updates = [LowRank(a, b) for a, b in zip(*self.experts(module), strict=True)]
            else:
                updates = [self.update(module)]
        parts = (part for update in updates for part in _arrays(update))
        if not all(numpy.isfinite(part).all() for part in parts):
            raise InputError(
                "its update holds numbers too large for 32 bits", place=self.folder, field=printable(module)
            )
        return updates

    def update(self, module: str) -> Update:
        """What the adapter adds to a module's weight [out, in].

        Raises:
            InputError: if the method adds nothing to a weight, or needs the base and there is none.
        """
        adapter = self.adapter(module)
        if not adapter.mergeable or adapter.shape.kind == "module" or adapter.follows_ties:
            raise InputError(
                f"{self.what} at {module} is no update of a weight matrix, so it can't be merged with others",
                place=self.folder,
            )
        if 0 in adapter.shape.matrix and self.base is None:
            self.base_weight(adapter.shape)
        if self.starts_from_quantized:
            raise InputError("LoftQ's update belongs to a base quantised its way, not to the base", place=self.folder)
        if is_plain_lora(adapter):
            pair = self.pair(module, cast(Lora, adapter))
            return LowRank(pair.a, pair.b * numpy.float32(adapter.scaling))
        p = self.tensors(module, adapter)
        if "lora_B.bias" in p:
            raise InputError("has `lora_bias`: a bias is no part of B A", place=self.folder, field="lora_bias")
        self._require_same_bias(adapter, p)
        if isinstance(adapter, LowRankAdapter) and type(adapter).delta is LowRankAdapter.delta:
            a, b = adapter.factors(p)
            return LowRank(a.numpy(), b.numpy())
        return Dense(self.matrix(adapter, p), self._nominal_rank(adapter))

    def matrix(self, adapter: Adapter, p: Tensors) -> NDArray[Any]:
        """The update [out, in] by the method's own equation."""
        if isinstance(adapter, DeltaAdapter):
            return adapter.delta(p).numpy()
        weight = self.base_weight(adapter.shape)
        return (adapter.merged_weight(p, weight) - weight).numpy()

    def pair(self, module: str, adapter: Lora) -> LowRank:
        """A and B of plain LoRA as matrices, without the scaling."""
        assert self.part is not None
        held = self.part.modules[self.paths[module]]
        names = ("lora_embedding_A", "lora_embedding_B") if adapter.shape.kind == "embedding" else FACTORS
        a, b = (self.array(held[name]) for name in names)
        return LowRank(a.reshape(len(a), -1), b.reshape(len(b), -1))

    def experts(self, module: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """A [experts, r, in] and B [experts, out, r], scaling in B, of a parameter that holds experts in one.

        In the file experts vary fastest along the columns of B.
        """
        assert self.part is not None
        adapter = cast(Lora, self.adapter(module))
        held, experts = self.part.modules[self.paths[module]], adapter.shape.experts
        a, b = (self.array(held[name]) for name in FACTORS)
        b = b.reshape(len(b), -1, experts).transpose(2, 0, 1) * numpy.float32(adapter.scaling)
        return a.reshape(experts, -1, a.shape[1]), b

    def _require_same_bias(self, adapter: Adapter, p: Tensors) -> None:
        """A method that turns outputs turns the bias with them, and some add to it: no update of the weight can do that."""
        if adapter.shape.out_features:
            bias = torch.full((adapter.shape.out_features,), float(adapter.shape.has_bias))  # none is a bias of zeros
            if not torch.equal(adapter.merged_bias(p, bias), bias):
                raise InputError(
                    f"{self.what} changes the bias of {adapter.shape.name}, which LoRA can't",
                    place=self.folder,
                    fix="merge it into the base: peft export --to merged",
                )

    def _nominal_rank(self, adapter: Adapter) -> int:
        rank = getattr(adapter, "r", None) or getattr(self.config, "r", None)
        return min(rank or USUAL_RANK, *adapter.shape.matrix)


def _arrays(update: Update) -> tuple[NDArray[Any], ...]:
    return (update.a, update.b) if isinstance(update, LowRank) else (update.matrix,)


def method_name(config: Any) -> str:
    """The method, as a message names it; a variant of LoRA by the field that asks for it."""
    variant = getattr(config, "variant", None)
    return "DoRA" if variant == "use_dora" else f"{config.peft_type} with {variant}" if variant else config.peft_type


def is_plain_lora(adapter: Adapter) -> bool:
    """Whether A and B are all there is: they are read without torch."""
    return type(adapter) is Lora and adapter.tensors().keys() <= {*FACTORS, "lora_embedding_A", "lora_embedding_B"}


def loaded(adapter: Adapter, held: dict[str, Tensor], shared: dict[str, Tensor]) -> Tensors:
    """A module's tensors from a file's, completed by those that files leave out."""
    if adapter.file_tensors().keys() != Adapter.file_tensors(adapter).keys():
        held = adapter.restored(held)
    p = Tensors()
    missing = {key: spec for key, spec in adapter.tensors().items() if not spec.shared and key not in held}
    if missing:
        with torch.no_grad():
            for key, spec in adapter.tensors().items():
                if not spec.shared:
                    dtype = getattr(torch, spec.dtype) if spec.dtype else torch.float32
                    p[key] = torch.empty(spec.shape, dtype=dtype)
                    fill(p[key], spec.init)
            p.update(shared)  # from which other tensors may follow
            adapter.regenerate(p)
    p.update(held)
    p.update(shared)
    return p


def _has_shared(adapter: Adapter) -> bool:
    return any(spec.shared for spec in adapter.tensors().values())


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
