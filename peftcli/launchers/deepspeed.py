"""DeepSpeed's JSON files: ZeRO stages 1 and 2. Values that the recipe decides are `auto`, and filled in here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.errors import InputError, InputErrors, printable

if TYPE_CHECKING:
    from peftcli.recipe.schema import Recipe

OURS = {
    "optimizer": "training.optim and the fields beside it",
    "scheduler": "training.lr_scheduler_type and the fields beside it",
    "fp16": "model.dtype",
    "bf16": "model.dtype and training.bf16",
    "amp": "training.bf16",
    "torch_autocast": "training.bf16",
    "data_efficiency": "the data section",
    "curriculum_learning": "the data section",
}
"""Sections of a file that would decide a second time what the recipe decides, and where it does."""

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Optimizers that treat each number for itself."""

INSTALL = "pip install 'peftcli[deepspeed]'"


def completed(values: dict[str, Any], recipe: Recipe, processes: int, *, place: Path) -> dict[str, Any]:
    """A file's values with every `auto` filled in.

    Args:
        values: as read.
        recipe: decides batch, accumulation and clipping.
        processes: of all machines.
        place: the file, for messages.

    Raises:
        InputErrors: the file says something else than the recipe, or asks for what is not supported; both places are named.
    """
    problems = list(_refused(values, recipe, place))
    filled = dict(values)
    for key, (value, field) in _decided(recipe, processes).items():
        stated = values.get(key, "auto")
        if stated not in ("auto", value):
            problems.append(_contradiction(key, stated, value, field, place))
        filled[key] = value
    if problems:
        raise InputErrors(problems)
    # Base and adapter stay in the types the recipe gives them, and the optimizer is torch's own.
    return {**filled, "zero_allow_untested_optimizer": True, "steps_per_print": 1 << 40}


def check_installed() -> None:
    """Refuse to start without DeepSpeed. No compiler is needed: the optimizers are torch's, and gloo serves on CPUs.

    Raises:
        InputError: with what to install.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError("needs the package deepspeed, which is not installed", field="launcher.type", fix=INSTALL)


def stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a file."""
    return int(config["zero_optimization"]["stage"])


def _decided(recipe: Recipe, processes: int) -> dict[str, tuple[float, str]]:
    """What the recipe decides of a file: value, and the recipe's field."""
    training = recipe.training
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": (batch, "training.per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "training.gradient_accumulation_steps"),
        "train_batch_size": (
            batch * accumulation * processes,
            "per_device_train_batch_size x gradient_accumulation_steps x processes",
        ),
        "gradient_clipping": (training.max_grad_norm, "training.max_grad_norm"),
    }


def _refused(values: dict[str, Any], recipe: Recipe, place: Path) -> Iterator[InputError]:
    zero = values.get("zero_optimization")
    found = zero.get("stage") if isinstance(zero, dict) else None
    if found not in (1, 2):
        yield InputError(f"is {printable(repr(found))}", place=place, field="zero_optimization.stage", allowed="1, 2")
    for key, field in OURS.items():
        section = values.get(key)
        if section is None or (isinstance(section, dict) and section.get("enabled") is False):
            continue
        yield InputError(
            f"is decided by the recipe ({field}), and must not be decided here as well",
            place=place,
            field=key,
            fix="take it out of the file",
        )
    if recipe.training.optim not in OPTIMIZERS:
        yield InputError(
            f"{recipe.training.optim} keeps no state of a parameter's own shape, and ZeRO cuts flattened parameters up",
            field="training.optim",
            allowed=", ".join(OPTIMIZERS),
        )
    yield from _not_yet(zero if isinstance(zero, dict) else {}, recipe)


def _not_yet(zero: dict[str, Any], recipe: Recipe) -> Iterator[InputError]:
    """What has not been proved under DeepSpeed."""
    other = "use launcher.type accelerate or fsdp"
    if recipe.quantization is not None:
        yield InputError("is not supported under DeepSpeed yet", field="quantization", fix=other)
    if any(isinstance(zero.get(name), dict) for name in ("offload_param", "offload_optimizer")):
        yield InputError("offloading is not supported yet", field="zero_optimization", fix="take it out of the file")


def _contradiction(key: str, stated: Any, value: Any, field: str, place: Path) -> InputError:
    return InputError(
        f"is {printable(repr(stated))}, but the recipe says {value:g} ({field})",
        place=place,
        field=key,
        fix="set it to `auto`, or change the recipe",
    )
