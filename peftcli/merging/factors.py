"""Merging A with A and B with B, as PEFT's `add_weighted_adapter` does (`--space factors`).

`linear` on factors is not the sum of the updates: (A1 + A2, B1 + B2) has cross terms (peft#3004). `cat` is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftcli.errors import InputError
from peftcli.merging.operators import OPERATORS, Settings, namespace

if TYPE_CHECKING:
    from peftcli.merging.operators import Array


def combine_factors(
    factors: Sequence[tuple[Array, Array]], scalings: Sequence[float], kind: str, settings: Settings, *, place: str
) -> tuple[Array, Array]:
    """A [r, in] and B [out, r], scaling 1, of a merge in factor space.

    Args:
        factors: A and B of each parent, without its scaling.
        scalings: weight times scaling of each parent.
        kind: `cat` or an operator's name.
        settings: densities and the like.
        place: the module, for messages.

    Raises:
        InputError: for an operator that needs equal ranks where they differ.
    """
    if kind == "cat":
        stacked = [a * scaling for (a, _), scaling in zip(factors, scalings, strict=True)]
        xp = namespace(stacked[0])
        return xp.concatenate(stacked), xp.concatenate([b for _, b in factors], axis=1)
    if len({a.shape for a, _ in factors}) > 1:
        raise InputError(
            "All adapters must have the same r value when using combination_type linear, ties, dare_ties or dare_linear.",
            place=place,
        )
    # The root of |w s| goes to both factors and the sign to A, so that a single parent comes out as w s B A.
    roots = [math.sqrt(abs(scaling)) for scaling in scalings]
    signed = [math.copysign(root, scaling) for root, scaling in zip(roots, scalings, strict=True)]
    operator = OPERATORS[kind]
    return operator([a for a, _ in factors], signed, settings), operator([b for _, b in factors], roots, settings)
