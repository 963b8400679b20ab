"""A picture of where an adapter acts: the size of its update in each layer, and how many directions it uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftcli.adapters.targets import layer_index
from peftcli.errors import InputError, printable
from peftcli.report.figures import new_figure


def plot_spectrum(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Write two panels over the layers, one line for each kind of module: norm of the update, effective rank.

    Args:
        rows: of `spectrum.spectrum_rows`.
        path: the picture, by its suffix PNG, PDF or SVG.
        title: over the picture.

    Raises:
        InputError: if there is nothing to draw, or the picture can't be written there.
    """
    from matplotlib.ticker import MaxNLocator

    if not rows:
        raise InputError("nothing to plot: no update is a product of two matrices", field="--plot")
    figure = new_figure(10, 4)
    norm, rank = figure.subplots(1, 2)
    for name, line in _lines(rows).items():
        layers = [layer for layer, _ in line]
        norm.plot(layers, [row["norm"] for _, row in line], marker=".", label=_literal(name))
        rank.plot(layers, [row["effective_rank"] for _, row in line], marker=".")
    norm.set(xlabel="layer", ylabel="norm of the update", ylim=(0, None))
    rank.set(xlabel="layer", ylabel="effective rank", ylim=(0, None))
    for axes in (norm, rank):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    norm.legend(fontsize="small")
    figure.suptitle(_literal(title))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a suffix that names no picture
        raise InputError(f"can't be written: {error}", place=path, field="--plot") from error


def _literal(text: str) -> str:
    """Text from a file, with nothing in it read as mathematics."""
    return printable(text).replace("$", r"\$")


def _lines(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """Rows by the last part of the module's name, with the layer each lies in."""
    lines: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for row in rows:
        name = row["module"].rpartition(".")[2]
        lines.setdefault(name, []).append((layer_index(row["module"]) or 0, row))
    return {name: sorted(line, key=lambda item: item[0]) for name, line in lines.items()}
