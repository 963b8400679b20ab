"""`peft train RECIPE`: check, tokenise, plan, show, and only then start processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from peftcli.cli import console
from peftcli.errors import InputError

if TYPE_CHECKING:
    from peftcli.recipe.schema import Recipe

LAUNCHER_ARGUMENTS = "peftcli.launcher_arguments"


class WithLauncherArguments(TyperCommand):
    """Keeps what stands after `--` for the launcher."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--" in args:
            dashes = args.index("--")
            ctx.meta[LAUNCHER_ARGUMENTS] = args[dashes + 1 :]
            args = args[:dashes]
        return super().parse_args(ctx, args)


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
        bool, typer.Option("--dry-run", help="Do everything up to training, show tokens and memory, write nothing.")
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
    as_json: Annotated[bool, typer.Option("--json", help="Write the result as one JSON value to stdout.")] = False,
) -> None:
    """Train an adapter as a recipe says. Everything is checked, and the data tokenised, before any process starts."""
    if schema:
        from peftcli.recipe.json_schema import recipe_schema

        console.say_json(recipe_schema())
        return
    if recipe is None:
        raise InputError("name a recipe", fix="peft train RECIPE.yaml")
    if overwrite and resume:
        raise InputError("--overwrite and --resume ask for opposite things")
    changes = list(overrides or [])
    changes += [f"training.output_dir={json.dumps(output_dir)}"] if output_dir is not None else []
    changes += [f"training.resume_from_checkpoint={json.dumps(resume)}"] if resume is not None else []

    from peftcli.recipe import yaml12
    from peftcli.recipe.load import dump_recipe, load_recipe

    loaded = load_recipe(recipe, changes)
    extra = ctx.meta.get(LAUNCHER_ARGUMENTS, [])
    if print_config:
        console.say(dump_recipe(loaded).rstrip(), limit=yaml12.MAX_BYTES)
    elif check:
        _say_checked(recipe, loaded, as_json)
    else:
        from peftcli.cli import train_run

        request = train_run.Request(loaded, str(recipe), overrides or [], extra, overwrite=overwrite, as_json=as_json)
        (train_run.rehearse if dry_run else train_run.run)(request)


def _say_checked(path: Path, recipe: Recipe, as_json: bool) -> None:
    if as_json:
        console.say_json({"recipe": str(path), "ok": True})
    else:
        console.say(f"{path}: a valid recipe ({recipe.adapter.method} on {recipe.model.name_or_path})")
