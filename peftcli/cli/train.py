"""`peft train RECIPE`: check, tokenise, plan, show, and only then start processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from peftcli.cli import console
from peftcli.cli import train_options as options
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


@dataclass(frozen=True)
class Switches:
    """What one run and a sweep are asked alike."""

    overwrite: bool
    audit: bool
    as_json: bool

    def typed(self) -> list[str]:
        """As on the command line."""
        typed = {"--overwrite": self.overwrite, "--no-audit": not self.audit, "--json": self.as_json}
        return [name for name, on in typed.items() if on]


def command(
    ctx: typer.Context,
    recipe: options.RecipeFile = None,
    overrides: options.Overrides = None,
    check: options.Check = False,
    dry_run: options.DryRun = False,
    schema: options.Schema = False,
    print_config: options.PrintConfig = False,
    resume: options.Resume = None,
    output_dir: options.OutputDir = None,
    overwrite: options.Overwrite = False,
    no_audit: options.NoAudit = False,
    emit: options.Emit = None,
    as_json: options.AsJson = False,
    sweep: options.Sweep = None,
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
    switches = Switches(overwrite=overwrite, audit=not no_audit, as_json=as_json)
    changes = [*(overrides or []), *_as_overrides(output_dir=output_dir, resume_from_checkpoint=resume)]
    extra = ctx.meta.get(LAUNCHER_ARGUMENTS, [])
    if sweep:
        if resume or print_config:
            raise InputError(f"--sweep does not go with {'--resume' if resume else '--print-config'}", fix=SWEEP_ADVICE)
        return _sweep(
            recipe, changes, sweep, extra, switches, stop="check" if check else "rehearse" if dry_run else None
        )

    from peftcli.recipe import yaml12
    from peftcli.recipe.load import build, dump_recipe, placed, read_tree

    tree = read_tree(recipe, changes)
    loaded = build(tree)
    if print_config:
        console.say(dump_recipe(loaded).rstrip(), limit=yaml12.MAX_BYTES)
    elif check:
        _say_checked(recipe, loaded, as_json)
    elif emit is not None:
        _emit(emit, loaded, ["peft", "train", str(recipe), *changes, *switches.typed()], extra)
    else:
        from peftcli.cli import train_run

        request = train_run.Request(loaded, str(recipe), overrides or [], extra, **asdict(switches))
        with placed(tree):
            (train_run.rehearse if dry_run else train_run.run)(request)
    return 0


def _as_overrides(**fields: str | None) -> Iterator[str]:
    """Options that stand for a field of `training`."""
    return (f"training.{name}={json.dumps(value)}" for name, value in fields.items() if value is not None)


def _sweep(
    recipe: Path, changes: list[str], grid: list[str], extra: list[str], switches: Switches, stop: str | None
) -> int:
    """Every run of a grid, or what comes before them."""
    from peftcli.cli import train_sweep

    asked = train_sweep.Request(recipe, changes, grid, extra, **asdict(switches))
    if stop is None:
        return train_sweep.run(asked)
    (train_sweep.check if stop == "check" else train_sweep.rehearse)(asked)
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
