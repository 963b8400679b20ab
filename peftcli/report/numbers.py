"""How numbers of an evaluation are written, on the screen and in reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftcli.evaluation.compare import Row


def number(value: float, sign: str = "") -> str:
    """Four decimals, or four digits where numbers are large."""
    return f"{value:{sign}.4f}" if abs(value) < 1000 else f"{value:{sign}.4g}"


def p_value(p: float) -> str:
    """`0.0310`, `< 0.0001`, or a dash where there is none."""
    if p != p:
        return "-"
    return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"


def difference(row: Row, column: str) -> str:
    """An adapter's difference from the base and its standard error."""
    delta = row.delta(column)
    return f"{number(delta.value, '+')} ± {number(delta.standard_error)}"
