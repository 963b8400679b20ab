"""Where the parameters that hold a mixture's experts in one lie in a checkpoint: in one tensor, or expert by expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftcli.adapters.base import SiteShape

Find = Callable[[str], tuple[str, tuple[int, ...]] | None]
"""Gives the name and shape of a tensor in the checkpoint from what the model calls it."""

TRANSPOSED = frozenset({"gpt_oss", "aria", "openai_privacy_filter"})
"""Model types whose experts are stored [experts, in, out] (transformers calls them `is_transposed`)."""

SPLIT = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""What checkpoints that hold experts one by one call a parameter's parts, one on top of the other; the second are Mixtral's."""

OWNERS = ((".mlp.", ".mlp."), (".mlp.", ".block_sparse_moe."))
"""What the module around the experts is called in the model, and in a checkpoint."""


@dataclass(frozen=True)
class Piece:
    """The part of a parameter [experts, out, in] that a tensor of the checkpoint holds.

    Attributes:
        name: the tensor's.
        expert: whose matrix it is; None for all of them.
        rows: which of the out rows, first and last but one.
        transposed: whether it holds [in, out].
    """

    name: str
    expert: int | None
    rows: tuple[int, int]
    transposed: bool = False


def pieces(shape: SiteShape, model_type: str | None, find: Find) -> list[Piece]:
    """The tensors that hold a parameter; [] where the checkpoint has another layout.

    Args:
        shape: the parameter, `name` its path in the model.
        model_type: the base's.
        find: looks tensors up.
    """
    whole = find(shape.name)
    if whole is not None:
        name, sizes = whole
        transposed = shape.experts > 1 and model_type in TRANSPOSED
        matrix = shape.matrix[::-1] if transposed else shape.matrix
        fits = sizes == ((shape.experts, *matrix) if shape.experts > 1 else matrix)
        return [Piece(name, None, (0, shape.out_features), transposed)] if fits else []
    owner, _, leaf = shape.name.rpartition(".")
    layouts = (
        _split(owner.replace(here, there), parts, shape, find)
        for parts in SPLIT.get(leaf, ())
        for here, there in OWNERS
    )
    return next((found for found in layouts if found), [])


def _split(owner: str, parts: tuple[str, ...], shape: SiteShape, find: Find) -> list[Piece]:
    """The pieces of experts stored one by one, if they are called that; [] if one is missing or of another shape."""
    height = shape.out_features // len(parts)
    found = []
    for expert in range(shape.experts):
        for place, part in enumerate(parts):
            tensor = find(f"{owner}.{expert}.{part}.weight")
            if tensor is None or tensor[1] != (height, shape.in_features):
                return []
            found.append(Piece(tensor[0], expert, (place * height, (place + 1) * height)))
    return found
