"""A heatmap of a merge: which modules keep their energy, how large they are, and where adapters disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftcli.adapters.targets import layer_index
from peftcli.errors import InputError, printable
from peftcli.lazy import numpy
from peftcli.merging.report import MergeReport
from peftcli.report.figures import new_figure


def plot_merge(report: MergeReport, path: Path) -> None:
    """Write three panels, layers across and kinds of module down.

    Raises:
        InputError: if there is nothing to draw, or the picture can't be written there.
    """
    from matplotlib.ticker import MaxNLocator

    if not report.modules:
        raise InputError("nothing to plot: no module's update was merged", field="--plot")
    kinds = list(dict.fromkeys(row.module.rpartition(".")[2] for row in report.modules))
    layers = 1 + max(layer_index(row.module) or 0 for row in report.modules)
    figure = new_figure(12, 1.5 + 0.35 * len(kinds))
    panels: dict[str, dict[str, Any]] = {
        "energy": {"title": "energy kept", "vmin": 0, "vmax": 1},
        "norm": {"title": "norm of the merged update"},
        "sign_conflicts": {"title": "sign conflicts", "vmin": 0, "vmax": 1, "cmap": "magma"},
    }
    for axes, (name, look) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        grid = numpy.full((len(kinds), layers), numpy.nan)
        for row in report.modules:
            value = getattr(row, name)
            grid[kinds.index(row.module.rpartition(".")[2]), layer_index(row.module) or 0] = (
                numpy.nan if value is None else value
            )
        title = look.pop("title")
        figure.colorbar(axes.imshow(grid, aspect="auto", **look), ax=axes)
        axes.set(title=title, xlabel="layer")
        axes.set_yticks(range(len(kinds)), [printable(kind).replace("$", r"\$") for kind in kinds])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a suffix that names no picture
        raise InputError(f"can't be written: {error}", place=path, field="--plot") from error
