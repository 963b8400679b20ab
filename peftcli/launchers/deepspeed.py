"""DeepSpeed's JSON files: ZeRO stages 1 to 3. Values that the recipe decides are `auto`, and filled in here."""

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

OTHER = "use launcher.type accelerate or fsdp"

STAGE_3_UNPROVED = ("xlora", "multitask_prompt_tuning")
"""Methods whose run under ZeRO-3 has not been compared with one process."""

STAGE_3_OPTIONS = {
    "stage",
    "overlap_comm",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "memory_efficient_linear",
    "offload_optimizer",
    "offload_param",
}
"""What a file may say of stage 3: what changes when data move, never what is computed."""

OFFLOAD_STAGES = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
"""What can be kept in main memory, and under which stages."""

OTHER_OFFLOADS = ("cpu_offload", "cpu_offload_params", "cpu_offload_use_pin_memory", "zenflow")
"""Older names of it, and an asynchronous kind that computes something else."""

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
    if filled["zero_optimization"]["stage"] == 3:
        filled["zero_optimization"] = {**filled["zero_optimization"], "memory_efficient_linear": False}
    # Base and adapter stay in the types the recipe gives them, and the optimizer is torch's own, offloaded too.
    own = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return {**filled, **own, "steps_per_print": 1 << 40}


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


def offloaded(config: dict[str, Any]) -> set[str]:
    """Which of `OFFLOAD_STAGES` a file puts into main memory."""
    zero = config["zero_optimization"]
    return {name for name in OFFLOAD_STAGES if (zero.get(name) or {}).get("device", "none") == "cpu"}


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
    if found not in (1, 2, 3):
        yield InputError(
            f"is {printable(repr(found))}", place=place, field="zero_optimization.stage", allowed="1, 2, 3"
        )
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
    if values.get("zero_force_ds_cpu_optimizer"):
        yield InputError(
            "would ask for DeepSpeed's Adam, which has to be compiled; here the optimizer is torch's",
            place=place,
            field="zero_force_ds_cpu_optimizer",
            allowed="false",
        )
    yield from _not_yet(zero if isinstance(zero, dict) else {}, recipe)
    yield from _offloads_refused(zero if isinstance(zero, dict) else {}, place)


def _not_yet(zero: dict[str, Any], recipe: Recipe) -> Iterator[InputError]:
    """What has not been proved under DeepSpeed."""
    if recipe.quantization is not None:
        yield InputError("is not supported under DeepSpeed yet", field="quantization", fix=OTHER)
    if zero.get("stage") == 3:
        yield from _not_yet_in_stage_3(zero, recipe)


def _offloads_refused(zero: dict[str, Any], place: Path) -> Iterator[InputError]:
    """What a file says of offloading that is not DeepSpeed's plain CPU offload."""
    for name, stages in OFFLOAD_STAGES.items():
        field, section = f"zero_optimization.{name}", zero.get(name)
        if section is None:
            continue
        if not isinstance(section, dict):
            shown = printable(repr(section))
            yield InputError(f"is {shown}", place=place, field=field, allowed="a mapping with device and pin_memory")
            continue
        for key in sorted(section.keys() - {"device", "pin_memory"}):
            yield InputError(
                "is not supported", place=place, field=f"{field}.{key}", allowed="device and pin_memory beside it"
            )
        for key, values in {"device": ("none", "cpu"), "pin_memory": (False, True)}.items():
            value = section.get(key, values[0])
            if type(value) is not type(values[0]) or value not in values:
                allowed = ", ".join(str(allowed).lower() for allowed in values)
                yield InputError(f"is {printable(repr(value))}", place=place, field=f"{field}.{key}", allowed=allowed)
        if zero.get("stage") not in stages:
            yield InputError("needs a sharded base", place=place, field=field, fix="set stage to 3, or take it out")
    if zero.get("stage") != 3:  # whose options are a list of their own
        for name in OTHER_OFFLOADS:
            if zero.get(name):
                fix = "use offload_optimizer: {device: cpu}"
                yield InputError("is not supported", place=place, field=f"zero_optimization.{name}", fix=fix)


def _not_yet_in_stage_3(zero: dict[str, Any], recipe: Recipe) -> Iterator[InputError]:
    where = "is not supported under ZeRO-3 yet"
    for name in sorted(zero.keys() - STAGE_3_OPTIONS):
        yield InputError(where, field=f"zero_optimization.{name}", fix="take it out of the file")
    if zero.get("memory_efficient_linear", False):  # DeepSpeed's default
        yield InputError(
            "would replace torch's linear layers", field="zero_optimization.memory_efficient_linear", allowed="false"
        )
    if recipe.adapter.method in STAGE_3_UNPROVED:
        yield InputError(f"{recipe.adapter.method} {where}", field="adapter.method", fix=OTHER)


def _contradiction(key: str, stated: Any, value: Any, field: str, place: Path) -> InputError:
    return InputError(
        f"is {printable(repr(stated))}, but the recipe says {value:g} ({field})",
        place=place,
        field=key,
        fix="set it to `auto`, or change the recipe",
    )
