"""The options of `peft train`, as Typer reads them from annotations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[Path | None, typer.Argument(metavar="RECIPE", help="A YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FIELD=VALUE]... [-- LAUNCHER ARGUMENTS]",
        help="Values laid over the recipe's, as in `training.learning_rate=1e-4`; `~quantization` takes one out.",
    ),
]
Check = Annotated[bool, typer.Option("--check", help="Only check the recipe: needs no torch.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Do everything up to training, show tokens and memory; write no run folder."),
]
Schema = Annotated[bool, typer.Option("--schema", help="Print the recipe's JSON schema, for editors.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved recipe, defaults and all.")]
Resume = Annotated[
    str | None, typer.Option(metavar="auto|DIR", help="Continue from the newest valid checkpoint, or from DIR.")
]
OutputDir = Annotated[
    str | None, typer.Option(metavar="DIR", help="Run folder, instead of the recipe's training.output_dir.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left in the run folder.")]
NoAudit = Annotated[bool, typer.Option("--no-audit", help="Train even on data that the audit would refuse.")]
Emit = Annotated[
    str | None,
    typer.Option(
        metavar="commands|slurm",
        help="Print what to start on each machine, a line for each, or a script for sbatch; then stop.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write the result as one JSON value to stdout.")]
Sweep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FIELD=VALUE,VALUE...",
        help="Run every combination of these values, one after another, and compare them; finished runs are kept, "
        "interrupted ones continued.",
    ),
]
