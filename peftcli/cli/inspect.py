"""`peft inspect PATH`: what an adapter, checkpoint, file of tensors or recipe holds, without importing torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from peftcli.adapters.audit import Audit, audit_folder
from peftcli.adapters.base_places import find_base
from peftcli.cli import console, inspect_views
from peftcli.errors import EXIT_FAILURE, InputError, InputErrors
from peftcli.inspection.summary import adapter_summary, kind_of, tensor_rows
from peftcli.inspection.tensors import tensors_summary


def command(
    path: Annotated[Path, typer.Argument(help="Adapter or model folder, checkpoint, .safetensors file or recipe.")],
    base: Annotated[
        str | None, typer.Option(help="The base model on this machine, by default the one the adapter names.")
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    norms: Annotated[bool, typer.Option("--norms", help="Norms of each module's tensors and of its update.")] = False,
    svd: Annotated[bool, typer.Option("--svd", help="Effective rank of each module's update.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw norm and effective rank by layer into FILE.png.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only look for problems; exit 1 if there are any.")] = False,
    diff: Annotated[Path | None, typer.Option(help="Another adapter folder: show what differs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON value.")] = False,
) -> int:
    """Show what an adapter, checkpoint, model or recipe holds, and what is wrong with it."""
    kind = kind_of(path)
    if kind != "adapter" and (norms or svd or plot or diff):
        raise InputError("--norms, --svd, --plot and --diff need an adapter's folder", place=path)
    folder = _base_folder(base)
    if check:
        return _check(path, kind, folder, as_json)
    if kind == "recipe":
        from peftcli.inspection.recipe import recipe_summary  # reads the schema, which other kinds need not wait for

        _show(recipe_summary(path), as_json)
        return 0
    if kind == "tensors":
        summary, errors = tensors_summary(path)
        _show(summary | ({"rows": tensor_rows(path)} if tensors else {}), as_json)
        return _end(errors)
    if kind == "model":
        from peftcli.inspection.model import model_rows, model_summary

        _show(model_summary(path) | ({"rows": model_rows(path)} if tensors else {}), as_json)
        return 0
    audit = audit_folder(path, base=folder)
    if diff is not None:
        return _diff(audit, diff, folder, as_json)
    summary = adapter_summary(audit)
    if tensors:
        summary["rows"] = tensor_rows(audit.file.path)
    _add_values(summary, audit, norms=norms, svd=svd, plot=plot)
    _show(summary, as_json)
    return _end(audit.errors)


def _base_folder(name: str | None) -> Path | None:
    """The folder of `--base`, which is looked at and never fetched or converted."""
    return None if name is None else find_base(name, None, beside=Path()) or Path(name)


def _show(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        console.say_json(summary)
    else:
        inspect_views.show(summary)


def _end(errors: list[InputError]) -> int:
    """The exit code 0, or the error that makes `main` show what is wrong and exit 2."""
    if errors:
        raise InputErrors(errors)
    return 0


def _add_values(summary: dict[str, Any], audit: Audit, *, norms: bool, svd: bool, plot: Path | None) -> None:
    """What needs arithmetic (and numpy); left out where values are not finite or shapes are wrong."""
    if not (norms or svd or plot) or audit.errors:
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for matrices this thin, threads cost more than they bring
    from peftcli.inspection.plot import plot_spectrum
    from peftcli.inspection.spectrum import norm_rows, spectrum_rows

    if norms:
        summary["norms"] = norm_rows(audit)
    if svd or plot:
        rows = spectrum_rows(audit)
        if svd:
            summary["svd"] = rows
        if plot:
            plot_spectrum(rows, plot, title=audit.folder.name)
            summary["plot"] = str(plot)


def _check(path: Path, kind: str, base: Path | None, as_json: bool) -> int:
    """Only the problems, doubts included, and what other programs make of the adapter."""
    from peftcli.inspection.check import check_path

    result = check_path(path, kind, base)
    if as_json:
        console.say_json(result)
    else:
        inspect_views.show_check(result)
    return EXIT_FAILURE if result["problems"] else 0


def _diff(audit: Audit, other: Path, base: Path | None, as_json: bool) -> int:
    from peftcli.inspection.diff import diff_summary

    second = audit_folder(other, base=base)
    _end(audit.errors + second.errors)
    result = diff_summary(audit, second)
    if as_json:
        console.say_json(result)
    else:
        inspect_views.show_diff(result)
    return 0
