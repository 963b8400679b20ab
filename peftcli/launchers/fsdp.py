"""FSDP files: accelerate's format, of which the section `fsdp_config` says how to shard.

accelerate itself takes no FSDP on the CPU and says nothing, so the worker shards by hand (training/strategies/fsdp.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.errors import InputError, InputErrors, nearest, printable
from peftcli.launchers import accelerate
from peftcli.launchers.configs import AUTO, contradictions

if TYPE_CHECKING:
    from peftcli.recipe.schema import Recipe

LAYERS = "fsdp_transformer_layer_cls_to_wrap"
CHOICES: dict[str, tuple[Any, ...]] = {
    "fsdp_version": (2,),
    "fsdp_reshard_after_forward": (True, False),
    "fsdp_offload_params": (False, True),
    "fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
    "fsdp_state_dict_type": ("FULL_STATE_DICT",),
}
"""What each setting may be; the first is taken where a file leaves it out. LAYERS and checkpointing come besides."""


def completed(values: dict[str, Any], recipe: Recipe, processes: int, *, place: Path) -> dict[str, Any]:
    """The section `fsdp_config` of a file, every setting filled in and proved to agree with the recipe.

    Args:
        processes: of all machines.
        place: the file.

    Raises:
        InputErrors: naming each setting that is unknown, impossible or not what the recipe says.
    """
    section = values.get("fsdp_config")
    if not isinstance(section, dict):
        raise InputError("has no section fsdp_config", place=place, field="launcher.config")
    checkpointing = {"fsdp_activation_checkpointing": recipe.training.gradient_checkpointing}
    problems = [
        *accelerate.problems(values, recipe, processes, place=place, kinds=("FSDP",), own="fsdp_config"),
        *contradictions(section, checkpointing, place),
        *_impossible(section, place),
        *_not_shardable(recipe, processes),
    ]
    if problems:
        raise problems[0] if len(problems) == 1 else InputErrors(problems)
    filled = {name: section.get(name, choices[0]) for name, choices in CHOICES.items()}
    return {**filled, **checkpointing, LAYERS: _layers(section.get(LAYERS, AUTO), place)}


def _impossible(section: dict[str, Any], place: Path) -> Iterator[InputError]:
    known = (*CHOICES, LAYERS, "fsdp_activation_checkpointing")
    for name, value in section.items():
        if name not in known:
            yield InputError(
                "is not known here",
                place=place,
                field=f"fsdp_config.{printable(name)}",
                allowed=", ".join(known),
                fix=str(nearest(str(name), known)) or "leave it out",
            )
        elif name in CHOICES and not any(type(value) is type(choice) and value == choice for choice in CHOICES[name]):
            yield InputError(
                f"is {printable(value)}",
                place=place,
                field=f"fsdp_config.{name}",
                allowed=", ".join(
                    str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in CHOICES[name]
                ),
            )


def _layers(value: Any, place: Path) -> list[str] | None:
    """Class names, given as one text with commas or as a list; None where the model's own say is taken."""
    if value == AUTO:
        return None
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(
            f"is {printable(value)}", place=place, field=f"fsdp_config.{LAYERS}", allowed="auto, or names of classes"
        )
    return [name.strip() for name in names]


def _not_shardable(recipe: Recipe, processes: int) -> Iterator[InputError]:
    """What can't be shared out: among one process, by an optimizer that knows no shards, or as the base is quantised."""
    if processes < 2:
        yield InputError("FSDP shards a base over two processes or more", field="launcher.num_processes")
    optimizer = recipe.training.optim
    if recipe.adapter.config is None and not optimizer.startswith("adamw_torch") and optimizer != "sgd":
        yield InputError(
            f"{optimizer} can't train sharded weights",
            field="training.optim",
            allowed="adamw_torch, adamw_torch_fused, sgd",
        )
    section = recipe.quantization
    if section is None:
        return
    if section.load_in_8bit:
        yield InputError("8-bit weights can't be sharded", field="quantization.load_in_8bit", fix="load_in_4bit: true")
    elif section.bnb_4bit_quant_storage != section.bnb_4bit_compute_dtype:
        yield InputError(
            f"is {section.bnb_4bit_quant_storage}: FSDP shards 4-bit weights that are stored as what they are computed in",
            field="quantization.bnb_4bit_quant_storage",
            fix=f"set it to {section.bnb_4bit_compute_dtype}, as bnb_4bit_compute_dtype is",
        )
