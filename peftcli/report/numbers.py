"""How numbers of an evaluation are written, on the screen and in reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftcli.evaluation.comparison import Row
    from peftcli.evaluation.estimates import Estimate


def number(value: float, sign: str = "") -> str:
    """Four decimals, or four digits where numbers are large."""
    return f"{value:{sign}.4f}" if abs(value) < 1000 else f"{value:{sign}.4g}"


def p_value(p: float) -> str:
    """`0.0310`, `< 0.0001`, or a dash where there is none."""
    if p != p:
        return "-"
    return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"


def difference(delta: Estimate) -> str:
    """A difference and its standard error."""
    return f"{number(delta.value, '+')} ± {number(delta.standard_error)}"


def pairs(rows: Sequence[Row]) -> Iterator[tuple[str, str, str, str]]:
    """Each metric of every two adapters: metric, who is compared, difference, p."""
    for row in rows:
        for one, other, delta, test in row.between():
            yield row.metric, f"{one} - {other}", difference(delta), p_value(test.p)
