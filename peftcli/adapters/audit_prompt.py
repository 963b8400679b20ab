"""The tensors of a learnt prompt: as many rows and columns as the config says?"""

from __future__ import annotations

from copy import copy
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from peftcli.adapters.audit_modules import Contents
from peftcli.adapters.base import TensorSpec
from peftcli.adapters.base_facts import BaseFacts
from peftcli.adapters.config import PeftConfig
from peftcli.adapters.findings import Findings
from peftcli.adapters.fit import ANY, agrees, shown
from peftcli.adapters.header import TensorFile, TensorInfo
from peftcli.adapters.keys import SHARED_PREFIX, Key
from peftcli.adapters.prompt_base import BASE_FACTS
from peftcli.adapters.registry import prompt_class


def check_prompt(config: PeftConfig, file: TensorFile, base: BaseFacts | None, findings: Findings) -> Contents:
    """Compare a prompt's tensors with its config.

    Returns:
        The file's other tensors (a task's head), to be checked as such.
    """
    shapes = _shapes(config, base)
    for name, spec in shapes.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            findings.error("is missing", name)
        elif not agrees(spec, tensor):
            findings.error(_wrong_shape(config, tensor, spec), name)
    return Contents(others=[(plain_key(name), tensor) for name, tensor in file.tensors.items() if name not in shapes])


def _shapes(config: PeftConfig, base: BaseFacts | None) -> dict[str, TensorSpec]:
    """What the file should hold. What the config leaves open comes from the base; where that is not at hand, two
    stand-ins show which dimensions depend on it."""
    known = base.language_config if base else {}
    open_facts = [names[0] for names in BASE_FACTS.values() if not any(name in known for name in names)]
    stated = []
    for size in (64, 128):
        whole: Any = copy(config)
        whole.complete(SimpleNamespace(**known, **dict.fromkeys(open_facts, size)))
        stated.append(prompt_class(whole)(whole).stored_shapes())
    return {
        name: TensorSpec(
            tuple(one if one == other else ANY for one, other in zip(*(s[name] for s in stated), strict=True))
        )
        for name in stated[0]
    }


def _wrong_shape(config: PeftConfig, tensor: TensorInfo, spec: TensorSpec) -> str:
    """What is wrong with a shape, with the fields of the config that it follows from."""
    numbers = {item.name: getattr(config, item.name) for item in fields(config)}
    said = [f"{name} {value}" for name, value in numbers.items() if type(value) is int]
    return f"is {list(tensor.shape)}, not {shown(spec.shape)} as {', '.join(said)} make it"


def plain_key(name: str) -> Key:
    """A prompt has no prefix; what is trained beside it has one, since nothing wraps the base."""
    module, _, parameter = name.removeprefix(SHARED_PREFIX).rpartition(".")
    return Key(name, module, parameter, False)
