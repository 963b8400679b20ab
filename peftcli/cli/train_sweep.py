"""`peft train RECIPE --sweep ...`: checks every combination, runs one after another, shows the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftcli.cli import console
from peftcli.errors import EXIT_FAILURE, InputError, InputErrors, RunError
from peftcli.sweep.grid import Grid, make_grid, parse_axis
from peftcli.sweep.runs import DONE, FAILED, NEW, PARTIAL, Run, carry_out, find_runs, forget

if TYPE_CHECKING:
    from peftcli.training.outline import Outline


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line.

    Attributes:
        file: the recipe.
        overrides: of all runs.
        axes: what stood behind `--sweep`.
        launcher_arguments: what stood after `--`.
        overwrite: run again what is there.
        audit: refuse data that the audit finds fault with.
        as_json: only JSON on stdout.
    """

    file: Path
    overrides: Sequence[str]
    axes: Sequence[str]
    launcher_arguments: Sequence[str] = ()
    overwrite: bool = False
    audit: bool = True
    as_json: bool = False


def check(request: Request) -> None:
    """Check every combination's recipe, without torch."""
    grid = _grid(request)
    if request.as_json:
        console.say_json({"recipe": str(request.file), "ok": True, "runs": len(grid.combinations)})
    else:
        console.say(f"{request.file}: valid recipes for {len(grid.combinations)} runs")


def rehearse(request: Request) -> None:
    """List the runs, with what each would train and how far it has come."""
    runs = _prepared(request)
    if request.as_json:
        from peftcli.sweep.table import to_dict

        console.say_json(to_dict(runs))
        return
    console.table((*_short_fields(runs), "parameters", "state"), [_line(run) for run in runs])
    console.facts(f"{len(runs)} runs", [("into", runs[0].folder.parent)])


def run(request: Request) -> int:
    """Carry the sweep out; 1 if a run failed."""
    from peftcli.sweep.table import save

    runs = _prepared(request)
    folder = runs[0].folder.parent
    for one in runs if request.overwrite else []:
        forget(one)
    say = console.note if request.as_json else console.say
    for number, one in enumerate(runs, start=1):
        head = f"[{number}/{len(runs)}] {_settings(one)}"
        if one.state == DONE:
            say(f"{head}: done before")
            continue
        say(f"{head}{': continued' if one.state == PARTIAL else ''}")

        def watch(line: str) -> None:
            if line.startswith("step "):
                console.note(f"  {line}")

        try:
            carry_out(one, launcher_arguments=request.launcher_arguments, audit=request.audit, watch=watch)
        except RunError:
            save(runs, folder)
            raise
        if one.state == FAILED:
            say(f"  failed: {one.reason}\n  all it said: {one.log}")
        else:
            say(f"  {_came_to(one)}")
        save(runs, folder)
    save(runs, folder)
    _show(runs, folder, request)
    return EXIT_FAILURE if any(one.state == FAILED for one in runs) else 0


def _grid(request: Request) -> Grid:
    grid = make_grid(request.file, request.overrides, [parse_axis(text) for text in request.axes])
    if any(one.recipe.launcher.num_machines > 1 for one in grid.combinations):
        raise InputError(
            "a sweep runs on one machine", field="launcher.num_machines", fix="`peft train` without --sweep, or 1"
        )
    return grid


def _prepared(request: Request) -> list[Run]:
    """The runs, each checked as far as can be without data or weights."""
    grid = _grid(request)
    for note in grid.notes:
        console.note(f"note: {note}")
    runs = find_runs(grid, overwrite=request.overwrite)
    problems = []
    for one in runs:
        try:
            one.trainable = _outline(one).trainable
        except InputError as error:
            found = error.problems if isinstance(error, InputErrors) else [error]
            problems += [InputError(str(item), place=f"run {_settings(one)}") for item in found]
    if problems:
        raise InputErrors(problems)
    _say_left_out(runs)
    return runs


def _outline(one: Run) -> Outline:
    from peftcli.training.outline import outline

    return outline(one.combination.recipe)


def _short_fields(runs: Sequence[Run]) -> list[str]:
    return [field.rpartition(".")[2] for field in runs[0].combination.settings]


def _settings(one: Run) -> str:
    return " ".join(f"{field}={value}" for field, value in one.combination.settings.items())


def _came_to(one: Run) -> str:
    metrics = ", ".join(f"{name} {value:.5g}" for name, value in one.metrics.items())
    return f"{metrics or 'done'} in {console.duration(one.result['seconds'])}"


def _line(one: Run) -> tuple[str, ...]:
    state = {NEW: "to run", PARTIAL: "to continue", DONE: "done before"}[one.state]
    return *one.combination.settings.values(), f"{one.trainable or 0:,}", state


def _say_left_out(runs: Sequence[Run]) -> None:
    """Once for each method, what of the recipe it does not have."""
    told = {}
    for one in runs:
        if one.combination.left_out:
            told[one.combination.recipe.adapter.method] = one.combination.left_out
    for method, fields in told.items():
        console.note(f"note: {method} has no {', '.join(fields)}: left out of the recipe's adapter")


def _show(runs: Sequence[Run], folder: Path, request: Request) -> None:
    from peftcli.sweep.table import HEADER, JSON, PLOT, best_of, cells, metric_of, to_dict, value_of

    if request.as_json:
        console.say_json(to_dict(runs))
        return
    metric, best = metric_of(runs), best_of(runs)
    rows = [("*" if one is best else "", *one.combination.settings.values(), *cells(one, metric)) for one in runs]
    console.table(("", *_short_fields(runs), metric, *HEADER), rows)
    if best is not None:
        console.facts("best", [("run", best.folder), (metric, f"{value_of(best, metric):.5g}")])
    done = [str(one.folder) for one in runs if one.state == DONE]
    console.facts(
        "written",
        [
            ("table", f"{folder / 'sweep.md'}, {folder / JSON}"),
            ("plot", folder / PLOT if (folder / PLOT).is_file() else None),
        ],
    )
    if done:
        console.facts("next", [("", f"peft eval {' '.join(done)} --report {folder / 'report'}")])
