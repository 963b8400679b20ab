"""The `peft` command. Only the command asked for is imported, so help and errors come at once.

A command is a file here with a Typer-annotated function `command`, and a line in `COMMANDS`.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from peftcli import __version__
from peftcli.cli import console
from peftcli.errors import EXIT_BAD_INPUT, EXIT_FAILURE, PeftCliError

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM

COMMANDS = {
    "train": "Train an adapter as a recipe says.",
    "merge": "Merge adapters into one.",
    "export": "Write an adapter in another form, merged into its base among them.",
    "eval": "Compare a base model with its adapters.",
    "inspect": "Show what an adapter, checkpoint or recipe holds.",
}

# Typer brings its own copy of click from 0.29 on and used click's before; this is the right class in both.
UsageError: Any = typer.BadParameter.__base__


class LazyGroup(TyperGroup):
    """Lists its commands by name and help text, and imports one when it is called."""

    def __init__(self, **attributes: Any) -> None:
        commands = {name: TyperCommand(name, help=text) for name, text in COMMANDS.items()}
        super().__init__(**{**attributes, "commands": commands})

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name else None, rest


app = typer.Typer(
    cls=LazyGroup,
    help="Fine-tune models with adapters: YAML recipes in, standard PEFT checkpoints out.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    console.show_tracebacks(debug)
    if version:
        console.say(f"peftcli {__version__}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0: done, 1: a run failed, 2: bad input, 130 or 143: stopped by SIGINT or SIGTERM.
    """
    with _as_a_program():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="peft", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UsageError as error:
        where = error.ctx.command_path if error.ctx else "peft"
        console.fail(f"{error.format_message()}\n  see: {where} --help")
        return EXIT_BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except PeftCliError as error:
        console.fail(str(error), error)
        return error.exit_code
    except Exception as error:
        console.fail_unexpectedly(error)
        return EXIT_FAILURE


def _load(name: str) -> Any:
    module = import_module(f"peftcli.cli.{name}")
    one = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    one.command(name, cls=getattr(module, "COMMAND_CLASS", TyperCommand))(module.command)
    return typer.main.get_command(one)


@contextmanager
def _as_a_program() -> Iterator[None]:
    """Warnings become one line each, and SIGTERM leaves through `finally` blocks (the training loop handles it itself)."""
    before = signal.signal(signal.SIGTERM, _terminate)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        if not sys.warnoptions:
            for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)  # about libraries' code, not about the user's run
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    console.note(f"warning: {message}")


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(EXIT_TERMINATED)
