"""`loss.png`: the curves of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftcli.report.figures import new_figure, png


def plot_losses(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Training and evaluation loss over steps.

    Args:
        rows: those of `log.jsonl`.
        path: a PNG file; equal rows give equal bytes.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.5, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per supervised token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    path.write_bytes(png(figure))
