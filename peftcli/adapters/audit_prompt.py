"""The tensors of a learnt prompt: as many rows and columns as the config says?"""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

from peftcli.adapters.audit_modules import Contents
from peftcli.adapters.base_facts import BaseFacts
from peftcli.adapters.config import PeftConfig
from peftcli.adapters.findings import Findings
from peftcli.adapters.header import TensorFile, TensorInfo
from peftcli.adapters.keys import SHARED_PREFIX, Key
from peftcli.adapters.registry import prompt_class
from peftcli.errors import InputError


def check_prompt(config: PeftConfig, file: TensorFile, base: BaseFacts | None, findings: Findings) -> Contents:
    """Compare a prompt's tensors with its config.

    Returns:
        The file's other tensors (a task's head), to be checked as such.
    """
    shapes = _shapes(config, base, findings)
    for name, shape in shapes.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            findings.error("is missing", name)
        elif tensor.shape != shape:
            findings.error(_wrong_shape(config, tensor, shape), name)
    return Contents(others=[(_key(name), tensor) for name, tensor in file.tensors.items() if name not in shapes])


def _shapes(config: PeftConfig, base: BaseFacts | None, findings: Findings) -> dict[str, tuple[int, ...]]:
    """What the file should hold. Sizes the config leaves open come from the base."""
    try:
        config.complete(SimpleNamespace(**base.config) if base else SimpleNamespace())  # type: ignore[attr-defined]
    except InputError as error:
        findings.doubt(f"the config leaves `{error.field}` open and the base is not at hand: sizes were not compared")
        return {}
    return prompt_class(config)(config).stored_shapes()


def _wrong_shape(config: PeftConfig, tensor: TensorInfo, shape: tuple[int, ...]) -> str:
    """What is wrong with a shape, with the fields of the config that it follows from."""
    numbers = {item.name: getattr(config, item.name) for item in fields(config)}
    said = [f"{name} {value}" for name, value in numbers.items() if type(value) is int]
    return f"is {list(tensor.shape)}, not {list(shape)} as {', '.join(said)} make it"


def _key(name: str) -> Key:
    """A prompt has no prefix; what is trained beside it has one, since nothing wraps the base."""
    module, _, parameter = name.removeprefix(SHARED_PREFIX).rpartition(".")
    return Key(name, module, parameter, False)
