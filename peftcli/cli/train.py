"""`peft train RECIPE`: check, tokenise, plan, show, and only then start processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from peftcli.cli import console
from peftcli.errors import InputError, printable

if TYPE_CHECKING:
    from peftcli.recipe.schema import Recipe

LAUNCHER_ARGUMENTS = "peftcli.launcher_arguments"
SWEEP = "--sweep"
SWEEP_ADVICE = "a sweep continues by itself what was interrupted; --dry-run lists its runs"


class WithLauncherArguments(TyperCommand):
    """Keeps what stands after `--` for the launcher, and gives `--sweep` every `field=values` that follows it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--" in args:
            dashes = args.index("--")
            ctx.meta[LAUNCHER_ARGUMENTS] = args[dashes + 1 :]
            args = args[:dashes]
        return super().parse_args(ctx, list(_sweep_repeated(args)))


def _sweep_repeated(args: list[str]) -> Iterator[str]:
    """`--sweep a=1,2 b=3,4` as `--sweep a=1,2 --sweep b=3,4`."""
    inside = False
    for index, argument in enumerate(args):
        first = index > 0 and args[index - 1] == SWEEP
        inside = first or (inside and "=" in argument and not argument.startswith("-"))
        if inside and not first:
            yield SWEEP
        yield argument


COMMAND_CLASS = WithLauncherArguments


def command(
    ctx: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="A YAML file.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FIELD=VALUE]... [-- LAUNCHER ARGUMENTS]",
            help="Values laid over the recipe's, as in `training.learning_rate=1e-4`; `~quantization` takes one out.",
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the recipe: needs no torch.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Do everything up to training, show tokens and memory; write no run folder."),
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the recipe's JSON schema, for editors.")] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved recipe, defaults and all.")
    ] = False,
    resume: Annotated[
        str | None, typer.Option(metavar="auto|DIR", help="Continue from the newest valid checkpoint, or from DIR.")
    ] = None,
    output_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Run folder, instead of the recipe's training.output_dir.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run left in the run folder.")
    ] = False,
    no_audit: Annotated[
        bool, typer.Option("--no-audit", help="Train even on data that the audit would refuse.")
    ] = False,
    emit: Annotated[
        str | None,
        typer.Option(
            metavar="commands|slurm",
            help="Print what to start on each machine, a line for each, or a script for sbatch; then stop.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the result as one JSON value to stdout.")] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE,VALUE...",
            help="Run every combination of these values, one after another, and compare them; finished runs are kept, "
            "interrupted ones continued.",
        ),
    ] = None,
) -> int:
    """Train an adapter as a recipe says. Everything is checked, and the data tokenised, before any process starts.

    peft train recipe.yaml training.learning_rate=1e-4

    peft train recipe.yaml --sweep adapter.method=lora,dora,ia3 training.learning_rate=1e-4,3e-4
    """
    if schema:
        from peftcli.recipe.json_schema import recipe_schema

        console.say_json(recipe_schema())
        return 0
    if recipe is None:
        raise InputError("name a recipe", fix="peft train RECIPE.yaml")
    if overwrite and resume:
        raise InputError("--overwrite and --resume ask for opposite things")
    changes = list(overrides or [])
    changes += [f"training.output_dir={json.dumps(output_dir)}"] if output_dir is not None else []
    changes += [f"training.resume_from_checkpoint={json.dumps(resume)}"] if resume is not None else []
    extra = ctx.meta.get(LAUNCHER_ARGUMENTS, [])
    if sweep:
        if resume or print_config:
            raise InputError(f"--sweep does not go with {'--resume' if resume else '--print-config'}", fix=SWEEP_ADVICE)
        from peftcli.cli import train_sweep

        asked = train_sweep.Request(
            recipe, changes, sweep, extra, overwrite=overwrite, audit=not no_audit, as_json=as_json
        )
        if check or dry_run:
            (train_sweep.check if check else train_sweep.rehearse)(asked)
            return 0
        return train_sweep.run(asked)

    from peftcli.recipe import yaml12
    from peftcli.recipe.load import build, dump_recipe, placed, read_tree

    tree = read_tree(recipe, changes)
    loaded = build(tree)
    if print_config:
        console.say(dump_recipe(loaded).rstrip(), limit=yaml12.MAX_BYTES)
    elif check:
        _say_checked(recipe, loaded, as_json)
    elif emit is not None:
        switches = {"--overwrite": overwrite, "--no-audit": no_audit, "--json": as_json}
        _emit(
            emit,
            loaded,
            ["peft", "train", str(recipe), *changes, *(name for name, on in switches.items() if on)],
            extra,
        )
    else:
        from peftcli.cli import train_run

        request = train_run.Request(
            loaded, str(recipe), overrides or [], extra, overwrite=overwrite, audit=not no_audit, as_json=as_json
        )
        with placed(tree):
            (train_run.rehearse if dry_run else train_run.run)(request)
    return 0


def _emit(form: str, recipe: Recipe, command: list[str], extra: list[str]) -> None:
    from peftcli.launchers import machines

    writers = {"commands": machines.commands, "slurm": machines.slurm}
    if form not in writers:
        raise InputError(f"there is no form {printable(repr(form))}", field="--emit", allowed=", ".join(writers))
    console.say(writers[form](recipe, command, extra))


def _say_checked(path: Path, recipe: Recipe, as_json: bool) -> None:
    if as_json:
        console.say_json({"recipe": str(path), "ok": True})
    else:
        console.say(f"{path}: a valid recipe ({recipe.adapter.method} on {recipe.model.name_or_path})")
