"""What a sweep came to: `sweep.json`, `sweep.md` and `sweep.png`, written anew after each run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peftcli.files import write_atomically
from peftcli.recipe.redact import redact
from peftcli.recipe.task_rules import higher_is_better
from peftcli.report.figures import new_figure, png
from peftcli.report.markdown import inline
from peftcli.sweep.runs import DONE, Run

JSON, MARKDOWN, PLOT = "sweep.json", "sweep.md", "sweep.png"


def metric_of(runs: Sequence[Run]) -> str:
    """The metric the runs are compared by: what decides the best checkpoint of each."""
    return runs[0].combination.recipe.training.metric_for_best_model


def value_of(run: Run, metric: str) -> float | None:
    return run.metrics.get(metric) if run.state == DONE else None


def best_of(runs: Sequence[Run]) -> Run | None:
    """The run with the best metric; the first of equals."""
    metric = metric_of(runs)
    measured = [run for run in runs if value_of(run, metric) is not None]
    sign = -1 if higher_is_better(metric) else 1
    return min(measured, key=lambda run: sign * (value_of(run, metric) or 0.0), default=None)


def to_dict(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything as JSON has it."""
    best = best_of(runs)
    return {
        "metric": metric_of(runs),
        "best": best.name if best else None,
        "runs": [
            {
                "name": run.name,
                "settings": run.combination.settings,
                "left_out": list(run.combination.left_out),
                "state": run.state,
                "reason": run.reason or None,
                "metrics": run.metrics or None,
                "trainable_parameters": run.trainable,
                "peak_memory_bytes": run.result.get("memory"),
                "seconds": run.result.get("seconds"),
                "file_bytes": run.file_bytes,
                "folder": str(run.folder),
                "recipe": str(run.recipe_file),
                "log": str(run.log),
            }
            for run in runs
        ],
    }


HEADER = ("parameters", "memory", "time", "file")


def cells(run: Run, metric: str) -> tuple[str, ...]:
    """State or metric, then what `HEADER` names; dashes where nothing is known."""
    value = value_of(run, metric)
    shown = run.state if run.state != DONE else "-" if value is None else f"{value:.5g}"
    return (
        shown,
        "-" if run.trainable is None else f"{run.trainable:,}",
        _size(run.result.get("memory")),
        _time(run.result.get("seconds")),
        _size(run.file_bytes),
    )


def save(runs: Sequence[Run], folder: Path) -> None:
    """Write table and plot; each file appears whole or not at all."""
    write_atomically(folder / JSON, json.dumps(to_dict(runs), indent=1, allow_nan=False) + "\n")
    write_atomically(folder / MARKDOWN, "\n".join(_markdown(runs)) + "\n")
    if any(run.state == DONE for run in runs):
        write_atomically(folder / PLOT, plot(runs))


def _markdown(runs: Sequence[Run]) -> Iterator[str]:
    metric, best = metric_of(runs), best_of(runs)
    yield "# Sweep\n"
    fields = list(runs[0].combination.settings)
    yield "| " + " | ".join([*map(_cell, fields), metric, *HEADER]) + " |"
    yield "|" + "---|" * len(fields) + "---:|" * (1 + len(HEADER))
    for run in runs:
        values = [_cell(value) for value in run.combination.settings.values()]
        shown = list(cells(run, metric))
        if run is best:
            shown[0] = f"**{shown[0]}**"
        yield "| " + " | ".join([*values, *shown]) + " |"
    if best:
        yield f"\nBest: `{best.folder}`"
    if any(run.state == DONE for run in runs):
        yield f"\n![metric, parameters, memory, time and file size of each run]({PLOT})"
    for run in runs:
        if run.combination.left_out:
            yield f"\n{_cell(run.name)}: without the recipe's {', '.join(run.combination.left_out)}, which its method does not have."
        if run.reason:
            yield f"\n{_cell(run.name)} failed: {_cell(run.reason)}"


def _cell(text: str) -> str:
    return inline(redact(text))


def _size(count: float | None) -> str:
    from peftcli.cli.console import size

    return "-" if count is None else size(count)


def _time(seconds: float | None) -> str:
    from peftcli.cli.console import duration

    return "-" if seconds is None else duration(seconds)


def plot(runs: Sequence[Run]) -> bytes:
    """A PNG: a panel of bars for the metric and each cost, a line for each finished run, the best one darker."""
    from matplotlib.ticker import MaxNLocator

    metric, best = metric_of(runs), best_of(runs)
    done = [run for run in runs if run.state == DONE]
    columns: list[tuple[str, list[float | None], float]] = [
        (metric, [value_of(run, metric) for run in done], 1.0),
        ("trained parameters, M", [run.trainable for run in done], 1e6),
        ("peak memory, GB", [run.result.get("memory") for run in done], 1e9),
        ("time, min", [run.result.get("seconds") for run in done], 60.0),
        ("file, MB", [run.file_bytes for run in done], 1e6),
    ]
    figure = new_figure(14, 1.1 + 0.34 * len(done))
    labels = [_label(run) for run in done]
    colours = ["C0" if run is best else "#9bb8d3" for run in done]
    for index, (title, values, unit) in enumerate(columns):
        axes = figure.add_subplot(1, len(columns), index + 1)
        numbers = [math.nan if value is None else value / unit for value in values]
        bars = axes.barh(range(len(done)), [0.0 if math.isnan(number) else number for number in numbers], color=colours)
        axes.bar_label(
            bars, ["" if math.isnan(number) else f"{number:.3g}" for number in numbers], padding=2, fontsize=7
        )
        axes.set_yticks(range(len(done)), labels if index == 0 else [""] * len(done), fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.margins(x=0.18)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.invert_yaxis()
        axes.tick_params(axis="x", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def _label(run: Run) -> str:
    """The values of the swept fields, on one line."""
    text = ", ".join(redact(value) for value in run.combination.settings.values())
    return (text if len(text) <= 40 else f"{text[:39]}…").replace("$", r"\$")
