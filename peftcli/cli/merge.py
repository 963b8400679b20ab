"""`peft merge PATH...`: several adapters into one, from their files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from peftcli.cli import console
from peftcli.errors import InputError

if TYPE_CHECKING:
    from peftcli.merging.report import MergeReport


def command(
    paths: Annotated[list[Path], typer.Argument(help="Adapter folders.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    method: Annotated[str, typer.Option(help="linear, cat, svd, ties, dare_linear, ..., as in PEFT.")] = "linear",
    weights: Annotated[list[str] | None, typer.Option(help="One for each adapter: 0.7,0.3; 1 each by default.")] = None,
    density: Annotated[list[str] | None, typer.Option(help="Share kept by pruning: one, or one for each.")] = None,
    majority_sign_method: Annotated[
        str | None, typer.Option(help="total (default) or frequency: how TIES elects signs.")
    ] = None,
    space: Annotated[str, typer.Option(help="delta: merge updates; factors: as add_weighted_adapter.")] = "delta",
    rank: Annotated[str | None, typer.Option(help="Rank of the result (16), or energy to keep (0.95).")] = None,
    base: Annotated[str | None, typer.Option(help="The base model, where the merge depends on it.")] = None,
    seed: Annotated[int, typer.Option(help="Of DARE and of randomised decompositions.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw energy, norms and conflicts by module.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON value.")] = False,
) -> int:
    """Merge adapters into one, without loading a base model."""
    import os

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices this thin lose more to threads than they gain
    if space not in ("delta", "factors"):
        raise InputError("is no space", field="--space", allowed="delta, factors")
    for path in paths:  # told before torch is imported
        if not path.exists():
            raise InputError("does not exist", place=path, fix="lists are written with commas: --weights 0.5,0.5")
    if plot is not None:
        from peftcli.report.figures import check_picture

        check_picture(plot)
    from peftcli.merging.algebra import Rank
    from peftcli.merging.merge import merge_adapters
    from peftcli.merging.settings import MergeSettings

    settings = MergeSettings(
        method=method,
        weights=numbers(weights, "--weights"),
        density=numbers(density, "--density"),
        majority_sign_method=cast(Any, majority_sign_method),
        space=cast(Literal["delta", "factors"], space),
        rank=Rank.parse(rank) if rank else None,
        seed=seed,
    )
    report = merge_adapters(
        paths, output, settings, base=base_folder(base) if base is not None else None, overwrite=overwrite
    )
    if plot is not None:
        from peftcli.merging.plot import plot_merge

        plot_merge(report, plot)
    if as_json:
        console.say_json({"output": str(output), **asdict(report)})
    else:
        _show(report, output)
    return 0


def numbers(values: list[str] | None, option: str) -> tuple[float, ...]:
    """`--weights 0.7,0.3` and `--weights 0.7 --weights 0.3` alike."""
    parts = [part for value in values or [] for part in value.split(",")]
    try:
        found = tuple(float(part) for part in parts)
    except ValueError as error:
        raise InputError(f"{','.join(parts)!r} is no list of numbers", field=option, allowed="0.7,0.3") from error
    if not all(abs(number) < float("inf") for number in found):
        raise InputError("holds a number that is not finite", field=option)
    return found


def base_folder(name: str) -> Path:
    """The folder of `--base`: a folder, a .gguf file, package:NAME or a hub id; fetched or converted if need be."""
    from peftcli.training.locate import resolve_base

    try:
        return resolve_base(name)
    except InputError as error:
        raise error.at(field="--base") from error


def _show(report: MergeReport, output: Path) -> None:
    for row, parent in enumerate(report.parents):
        text = f"{parent.weight:g} x {parent.name} ({parent.peft_type})"
        if parent.density is not None:
            text += f", density {parent.density:g}"
        others = [f"{value:+.3f}" for value in report.cosines[row]] if report.cosines else []
        console.say(text + (f"   cosines {' '.join(others)}" if len(others) > 1 else ""))
    if report.modules:
        low = min(report.modules, key=lambda item: item.energy)
        conflicts = report.sign_conflicts
        console.facts(
            "merged",
            [
                ("method", f"{report.method} in {report.space} space"),
                ("modules", len(report.modules)),
                ("rank", _span([item.rank for item in report.modules])),
                ("energy kept", f"{report.energy:.2%} in all, least {low.energy:.2%} at {low.module}"),
                ("sign conflicts", None if conflicts is None else f"{conflicts:.1%} of shared places"),
            ],
        )
        if report.energy < 0.9:
            console.note("a good part of the merged update is lost: a larger --rank, e.g. --rank 0.95, keeps more")
    console.say(f"{report.peft_type} adapter: {output}", "bold")


def _span(values: list[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"
