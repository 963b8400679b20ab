"""What a checkpoint holds besides the adapter, so that a resumed run continues bit for bit: JSON and safetensors only.

trainable.safetensors   every trained tensor (and persistent buffer) under its live name
optimizer.safetensors   the optimizer's tensors, `<parameter>/<field>`
trainer.json            progress, settings that must not change, schedule, callbacks, random states
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np  # noqa: TID253
import torch  # noqa: TID253
from safetensors.torch import load_file, save_file
from torch import Tensor, nn  # noqa: TID253
from torch.optim import Optimizer  # noqa: TID253

from peftcli.errors import InputError, InputErrors, RunError, printable
from peftcli.names import TRAINABLE

OPTIMIZER = "optimizer.safetensors"
TRAINER = "trainer.json"

FLOAT32 = "float32"
"""Field of an optimizer's state: what a parameter of 16 bits is before rounding, where the optimizer keeps that (ZeRO)."""


@dataclass
class Progress:
    """How far a run has come. Sums are over all processes.

    Attributes:
        step: optimizer steps done.
        epoch: epochs finished.
        chunk: of a stream, chunks finished in the running epoch.
        window: optimizer steps done in the running epoch, of a stream in the running chunk.
        tokens: tokens seen, without padding.
        seconds: time in the loop.
        loss_sum: training loss since the last log entry, summed over labels.
        label_count: labels since the last log entry.
        best_step: step of the best evaluation.
        best_metrics: the evaluation there.
        metrics: the last evaluation.
    """

    step: int = 0
    epoch: int = 0
    chunk: int = 0
    window: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    label_count: int = 0
    best_step: int | None = None
    best_metrics: dict[str, float] | None = None
    metrics: dict[str, float] | None = None


# -- tensors --------------------------------------------------------------------------------------------------------


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Live name -> tensor, for everything training may change: trainable parameters and persistent buffers."""
    found: dict[str, Tensor] = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[prefix + name] = buffer
    return found


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors and read them back: what is on disk is what was in memory.

    Raises:
        RunError: a value is not finite, or the file holds something else.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RunError(f"{name} holds values that are not finite; nothing was saved")
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(values, path, metadata={"format": "pt"})
    back = load_file(path)
    wrong = [name for name, tensor in values.items() if not torch.equal(back[name], tensor)]
    if wrong or back.keys() != values.keys():
        raise RunError(f"{path}: reads back different from what was written ({', '.join(wrong[:5])})")


def load_trained(model: nn.Module, folder: Path) -> None:
    """Put the trained tensors of a checkpoint into the model, in place.

    Raises:
        InputErrors: listing every tensor that is missing, unknown or of another shape or type.
    """
    live, stored = trained_tensors(model), load_file(folder / TRAINABLE)
    problems = [InputError("is missing", place=name) for name in live.keys() - stored.keys()]
    problems += [InputError("is not part of this model", place=name) for name in stored.keys() - live.keys()]
    for name in live.keys() & stored.keys():
        have, want = stored[name], live[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            problems.append(
                InputError(f"is {list(have.shape)} {have.dtype}, not {list(want.shape)} {want.dtype}", place=name)
            )
    if problems:
        problems.sort(key=str)
        raise InputErrors([InputError("does not fit this run's adapter and base", place=folder / TRAINABLE), *problems])
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(stored[name])


# -- optimizer ------------------------------------------------------------------------------------------------------


def parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Live names in the optimizer's own order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def split_optimizer(optimizer: Optimizer, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors `<parameter>/<field>` and plain values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        for field, value in _unwrapped(entry):
            if isinstance(value, Tensor):
                tensors[f"{names[index]}/{field}"] = value
            else:
                values.setdefault(names[index], {})[field] = value
    return tensors, {"groups": state["param_groups"], "values": values}


def _unwrapped(entry: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A parameter's state, field by field.

    bitsandbytes hides its own tensors from FSDP in an inner dict, and takes them back with or without it. Copies, since
    parameters share the table of 8-bit values and a file holds no tensor twice.
    """
    for field, value in entry.items():
        if isinstance(value, dict):
            yield from ((name, tensor.clone()) for name, tensor in value.items())
        else:
            yield field, value


def join_optimizer(optimizer: Optimizer, names: list[str], folder: Path, plain: dict[str, Any]) -> None:
    """Undo `split_optimizer`."""
    index = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {index[name]: dict(fields) for name, fields in plain["values"].items()}
    for key, tensor in load_file(folder / OPTIMIZER).items():
        name, field = key.rsplit("/", 1)
        if field != FLOAT32:
            state.setdefault(index[name], {})[field] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": read_groups(plain)})


def read_groups(plain: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The optimizer's groups in a checkpoint. JSON has lists where torch wants tuples (Adam's betas)."""
    return [{key: tuple(v) if key == "betas" else v for key, v in group.items()} for group in plain["groups"]]


# -- random states --------------------------------------------------------------------------------------------------


def random_states() -> dict[str, Any]:
    """The state of every generator of this process, as JSON."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Undo `random_states`."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(_from_hex(states["torch"]))
    if states["cuda"]:
        torch.cuda.set_rng_state_all([_from_hex(state) for state in states["cuda"]])


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


# -- trainer.json ---------------------------------------------------------------------------------------------------


def write_trainer(folder: Path, content: dict[str, Any]) -> None:
    (folder / TRAINER).write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def read_trainer(folder: Path) -> dict[str, Any]:
    return json.loads((folder / TRAINER).read_text(encoding="utf-8"))


def require_same(stored: Mapping[str, Any], current: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume a run whose curve the changed settings would bend.

    Raises:
        InputErrors: naming each changed field, what it was and what it is.
    """
    changed = [
        InputError(
            f"was {printable(stored.get(field))}, is {printable(value)}: the run could not continue as it began",
            place=folder,
            field=field,
            fix="set it back, or start a new run",
        )
        for field, value in current.items()
        if stored.get(field) != value
    ]
    if changed:
        raise InputErrors(changed)


def fingerprint(*columns: np.ndarray) -> str:
    """sha256 over arrays: which data a run was trained on."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()
