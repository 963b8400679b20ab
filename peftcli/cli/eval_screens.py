"""What `peft eval` shows: values and differences, what an adapter lost, and samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftcli.cli import console
from peftcli.report.numbers import difference, number, p_value, pairs

if TYPE_CHECKING:
    from peftcli.evaluation.comparison import Comparison, Item, Row

MAX_COLUMNS_PAIRED = 3
MAX_LOST = 5
MAX_SAMPLES = 3
MAX_TEXT = 160  # characters of a prompt or an answer


def show(comparison: Comparison) -> None:
    """Table, regressions, samples."""
    if len(comparison.columns) == 1:
        [column] = comparison.columns
        header = ("metric", "n", "base", column, "delta", "p")
        console.table(header, [_cells(row, column) for row in comparison.rows])
    else:
        cells = [line for row in comparison.rows for line in _lines(row)]
        console.table(("metric", "n", "base", *comparison.columns), cells)
        if len(comparison.columns) <= MAX_COLUMNS_PAIRED:
            console.table(("metric", "between adapters", "difference", "p"), list(pairs(comparison.rows)))
    for column in comparison.columns:
        _show_lost(comparison, column)
    if comparison.items:
        console.say("Samples", style="bold")
        for item in comparison.items[:MAX_SAMPLES]:
            _show_item(item, list(item.answers))


def _cells(row: Row, column: str) -> tuple[str, ...]:
    tuned = row.adapters[column]
    values = number(row.base.value), number(tuned.value), difference(row.delta(column))
    return row.metric, str(row.count), *values, p_value(row.test(column).p)


def _lines(row: Row) -> list[tuple[str, ...]]:
    """A row of values, one of differences below it, one of p values."""
    return [
        (row.metric, str(row.count), number(row.base.value), *(number(one.value) for one in row.adapters.values())),
        ("  - base", "", "", *(difference(row.delta(column)) for column in row.adapters)),
        ("  p", "", "", *(p_value(row.test(column).p) for column in row.adapters)),
    ]


def _show_lost(comparison: Comparison, column: str) -> None:
    """Items the base had right and the adapter has wrong."""
    lost, gained = comparison.lost(column), comparison.gained(column)
    if not lost:
        return
    who = "the adapter" if len(comparison.columns) == 1 else column
    shown = f", the first {MAX_LOST}" if len(lost) > MAX_LOST else ""
    console.say(f"The base had right and {who} has wrong: {len(lost)}{shown} (the other way: {len(gained)})", "bold")
    for item in lost[:MAX_LOST]:
        _show_item(item, ["base", column])


def _show_item(item: Item, columns: list[str]) -> None:
    texts = {"question": item.question, "expected": " | ".join(item.expected)}
    texts |= {column: item.answers[column] for column in columns}
    width = max(map(len, texts))
    for name, text in texts.items():
        console.say(f"  {name:<{width}}  {_one_line(text, from_end=name == 'question')}")
    console.say()


def _one_line(text: str, from_end: bool) -> str:
    """A text on one line; of a long prompt the end is shown, of a long answer the beginning."""
    line = " ".join(text.split())
    if len(line) <= MAX_TEXT:
        return line
    return f"...{line[-MAX_TEXT:]}" if from_end else f"{line[:MAX_TEXT]}..."
