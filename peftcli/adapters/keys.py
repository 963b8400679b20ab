"""Names of tensors in an adapter file: what a well-written one looks like, and what usually went wrong with others.

`base_model.model.` + the module's path in the base + the method's own name, the adapter's name left out:
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."

WRAPPERS = {
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_orig_mod": "torch.compile",
}
"""Names that wrapping a model puts anywhere into its tensors' names."""

PLAIN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class Key:
    """A tensor's name, taken apart.

    Attributes:
        name: as it stands in the file.
        module: path of the module in the wrapped model; empty for tensors kept once a model.
        parameter: the method's own name (`lora_A.weight`), or the last part of any other tensor.
        is_method: whether `parameter` is one of the method's.
        faults: what is wrong with the name, each in words.
    """

    name: str
    module: str
    parameter: str
    is_method: bool
    faults: tuple[str, ...] = ()

    @property
    def site(self) -> str:
        """Path of the module in the base model."""
        return base_path(self.module)


class KeyReader:
    """Takes names apart, however they are written.

    Args:
        parameters: the method's own names, e.g. `lora_A.weight`.
    """

    def __init__(self, parameters: Iterable[str]) -> None:
        self.parameters = frozenset(parameters)
        self.lengths = sorted({name.count(".") + 1 for name in self.parameters}, reverse=True)

    def read(self, name: str) -> Key:
        """The parts of a name, and what is wrong with it."""
        faults = []
        if PLAIN.fullmatch(name) is None:
            faults.append("has characters that do not belong into a name")
        path = name
        for wrapper, author in WRAPPERS.items():
            if f"{wrapper}." in path:
                faults.append(f"still carries `{wrapper}.`, left there by {author}")
                path = path.replace(f"{wrapper}.", "")
        for head in ("", SHARED_PREFIX, PREFIX):
            if path.startswith(f"{head}module."):
                faults.append("still carries `module.`, left there by DistributedDataParallel")
                path = head + path.removeprefix(f"{head}module.")
        shared = path.removeprefix(SHARED_PREFIX)
        if shared in self.parameters or numbered_zero(shared) in self.parameters:
            return Key(name, "", shared, True, tuple(faults))
        if not path.startswith(PREFIX):
            faults.append(f"lacks the prefix `{PREFIX}`")
        path = path.removeprefix(PREFIX)
        if path.startswith(PREFIX):
            faults.append(f"carries the prefix `{PREFIX}` more than once, left there by a PeftModel inside another")
            path = path.removeprefix(PREFIX)
        return self._split(name, path.split("."), faults)

    def _split(self, name: str, parts: list[str], faults: list[str]) -> Key:
        """The module and the parameter of a path in the base model."""
        for length in self.lengths:
            parameter = ".".join(parts[-length:])
            if parameter in self.parameters:
                return Key(name, ".".join(parts[:-length]), parameter, True, tuple(faults))
        for length in self.lengths:  # `lora_A.default.weight`: the adapter's name after the first part
            if len(parts) <= length + 1:
                continue
            first, adapter, *rest = parts[-length - 1 :]
            parameter = ".".join([first, *rest])
            if parameter in self.parameters:
                faults = [*faults, f"still carries the adapter's name `.{adapter[:60]}.`"]
                return Key(name, ".".join(parts[: -length - 1]), parameter, True, tuple(faults))
        return Key(name, ".".join(parts[:-1]), parts[-1], False, tuple(faults))


def numbered_zero(name: str) -> str:
    """`tinylora_v.0` for `tinylora_v.7`, `frod_V.0` for `frod_V.mlp_fc1`: which there are depends on the model."""
    return re.sub(r"\.[^.]+$", ".0", name)


def base_path(module: str) -> str:
    """A module's path without the names that wrapping modules put into it."""
    return ".".join(part for part in module.split(".") if part != "base_layer")


def ascii_name(name: str) -> str:
    """A name with look-alikes of other alphabets escaped, so that they show."""
    return name if name.isascii() else name.encode("ascii", "backslashreplace").decode()
