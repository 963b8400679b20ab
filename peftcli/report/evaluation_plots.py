"""Pictures of an evaluation: a panel of bars for each metric, and how the losses of samples are spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftcli.report.figures import new_figure, png

if TYPE_CHECKING:
    from peftcli.evaluation.comparison import Row

BASE_COLOUR = "0.65"
PANELS_IN_A_ROW = 4
MAX_NAME = 48  # characters


def plot_metrics(rows: Sequence[Row]) -> bytes:
    """A PNG with a panel for each metric: base and adapters as bars, with lines of one standard error each way."""
    columns = min(PANELS_IN_A_ROW, len(rows))
    lines = math.ceil(len(rows) / columns)
    names = ["base", *rows[0].adapters]
    figure = new_figure(2.9 * columns + 0.07 * max(map(len, names)), (0.9 + 0.3 * len(names)) * lines)
    for index, row in enumerate(rows):
        axes = figure.add_subplot(lines, columns, index + 1)
        _draw(axes, row)
        axes.set_yticks(range(len(names)), map(_text, names) if index % columns == 0 else [""] * len(names), fontsize=8)
    return png(figure)


def _draw(axes: Any, row: Row) -> None:
    """The bars of one metric, the base on top."""
    estimates = [row.base, *row.adapters.values()]
    values = [one.value for one in estimates]
    errors = [0.0 if math.isnan(one.standard_error) else one.standard_error for one in estimates]
    colours = [colour(place) for place in range(len(values))]
    bars = axes.barh(range(len(values)), values, xerr=errors, color=colours, capsize=3, height=0.7)
    axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=4, fontsize=7)
    ends = (value + error for value, error in zip(values, errors, strict=True))
    axes.set_xlim(min(0.0, *values), max(0.0, *ends) * 1.2 or 1.0)
    axes.invert_yaxis()
    arrow = "higher is better" if row.higher_is_better else "lower is better"
    axes.set_title(f"{_text(row.metric)}\n", fontsize=10, fontweight="bold")
    axes.text(0.5, 1.02, f"n = {row.count}, {arrow}", transform=axes.transAxes, ha="center", va="bottom", fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plot_losses(losses: Mapping[str, Any]) -> bytes:
    """A PNG of how the samples' losses per label are spread, base and adapters over each other."""
    import numpy as np

    figure = new_figure(7, 3.2)
    axes = figure.add_subplot()
    everything = np.concatenate(list(losses.values()))
    edges = np.histogram_bin_edges(everything, bins=min(40, max(8, int(math.sqrt(len(everything)) * 2))))
    for place, (name, values) in enumerate(losses.items()):
        label = f"{_text(name)} (median {np.median(values):.3g})"
        axes.hist(values, edges, histtype="stepfilled", color=colour(place), alpha=0.35)
        axes.hist(values, edges, histtype="step", color=colour(place), linewidth=1.4, label=label)
    axes.set_xlabel("loss per label of a sample")
    axes.set_ylabel("samples")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    return png(figure)


def colour(place: int) -> str:
    """Grey for the base, then matplotlib's own."""
    return BASE_COLOUR if place == 0 else f"C{(place - 1) % 10}"


def _text(name: str) -> str:
    """A name as it stands, a very long one cut: a dollar sign begins no formula."""
    return (name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…").replace("$", r"\$")
