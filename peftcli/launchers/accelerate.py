"""Files of accelerate's format, as `accelerate config` writes them: what they say beside the recipe must agree with it.

`peft train` gives what the recipe decides to `accelerate launch` as arguments, which win over the file without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.errors import InputError, InputErrors, printable
from peftcli.launchers.configs import AUTO, contradictions

if TYPE_CHECKING:
    from peftcli.recipe.schema import Recipe

SECTIONS = {
    "deepspeed_config": "launcher.type deepspeed reads a file of DeepSpeed's own format",
    "fsdp_config": "launcher.type fsdp reads it",
    "megatron_lm_config": "it is not supported",
    "parallelism_config": "it is not supported",
    "tpu_config": "it is not supported",
    "fp8_config": "it is not supported",
    "dynamo_config": "compiling is not supported",
}
"""Sections that change how a model is trained, and what is said where they don't belong."""


def check(values: Mapping[str, Any], recipe: Recipe, processes: int, *, place: Path) -> None:
    """Prove that a file of the user's for `accelerate launch` says nothing but what the recipe does.

    Args:
        values: as read.
        recipe: decides processes, machines and precision.
        processes: of all machines.
        place: the file.

    Raises:
        InputErrors: naming each key that says something else, with both values.
    """
    # MULTI_CPU would start one process and say nothing; the worker takes the CPU by itself where there is no GPU.
    kinds = ("MULTI_GPU",) if processes > 1 else ("NO", "MULTI_GPU")
    if found := list(problems(values, recipe, processes, place=place, kinds=kinds)):
        raise InputErrors(found)


def problems(
    values: Mapping[str, Any],
    recipe: Recipe,
    processes: int,
    *,
    place: Path,
    kinds: tuple[str, ...],
    own: str | None = None,
) -> Iterator[InputError]:
    """What of a file contradicts the recipe.

    Args:
        kinds: what `distributed_type` may be.
        own: the section that is read.
    """
    launcher = recipe.launcher
    given = {"main_process_ip": launcher.main_process_ip, "main_process_port": launcher.main_process_port}
    decided = {
        "num_processes": processes,
        "num_machines": launcher.num_machines,
        "machine_rank": launcher.machine_rank or 0,
        "mixed_precision": "bf16" if recipe.training.bf16 else "no",
        "gradient_accumulation_steps": recipe.training.gradient_accumulation_steps,
        **{name: value for name, value in given.items() if value is not None},
    }
    yield from contradictions(values, decided, place)
    kind = values.get("distributed_type", AUTO)
    if kind not in (AUTO, *kinds):
        yield InputError(
            f"is {printable(kind)}, but the recipe's launcher.type is {launcher.type} with {processes} processes",
            place=place,
            field="distributed_type",
            allowed=", ".join(kinds),
        )
    for name, meaning in SECTIONS.items():
        if values.get(name) and name != own:
            yield InputError(
                f"is not for launcher.type {launcher.type}: {meaning}", place=place, field=name, fix="take it out"
            )
