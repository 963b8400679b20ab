"""What commands write to the terminal. Text is shown as it stands: no markup, no escape sequences, no secrets."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from peftcli.errors import printable
from peftcli.recipe.redact import redact

if TYPE_CHECKING:
    from rich.console import Console

MAX_MESSAGE = 32_000  # characters

_tracebacks = False


def show_tracebacks(wanted: bool) -> None:
    """Whether failures show where in the program they happened (`peft --debug`)."""
    global _tracebacks
    _tracebacks = wanted


@cache
def _console(stream: IO[str]) -> Console:
    from rich.console import Console

    return Console(file=stream, markup=False, highlight=False, emoji=False, soft_wrap=True)


def out() -> Console:
    """The console of results. Rich honours NO_COLOR and leaves colours out where there is no terminal."""
    return _console(sys.stdout)


def err() -> Console:
    """The console of everything that is not a result."""
    return _console(sys.stderr)


def say(text: str = "", style: str | None = None, *, limit: int = MAX_MESSAGE) -> None:
    """A line or more of results on stdout."""
    out().print(printable(redact(text), limit), style=style)


def note(text: str) -> None:
    """A line on stderr about what goes on."""
    err().print(printable(redact(text), MAX_MESSAGE), style="dim")


def say_json(value: Any) -> None:
    """The one JSON value a command with `--json` writes to stdout."""
    sys.stdout.write(redact(json.dumps(value, indent=2, ensure_ascii=True, default=str)) + "\n")


def facts(title: str, rows: Iterable[tuple[str, Any]]) -> None:
    """A titled block of `name  value` lines."""
    shown = [(name, str(value)) for name, value in rows if value is not None]
    width = max((len(name) for name, _ in shown), default=0)
    say(title, style="bold")
    for name, value in shown:
        say(f"  {name:<{width}}  {value}")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table with a line under its header; columns that hold numbers are set to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    cells = [[printable(redact(str(cell))) for cell in row] for row in rows]
    grid = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for index, name in enumerate(header):
        numeric = bool(cells) and all(row[index][:1] in "+-.0123456789<" for row in cells)
        grid.add_column(printable(name), justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        grid.add_row(*(Text(cell) for cell in row))
    out().print(grid)


def path(full: str | Path, *, home: bool = True) -> str:
    """A path as a person in the current folder would write it: from there on, or else from `~`, where it lies below.

    Args:
        home: `~` may stand for the home folder; not in a command that is quoted.
    """
    starts = {Path.cwd(): "", **({Path.home(): "~/"} if home else {})}
    for start, shown in starts.items():
        if start != Path("/") and start in Path(full).parents:
            return shown + str(Path(full).relative_to(start))
    return str(full)


def size(count: float) -> str:
    """Bytes as people read them: `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """`4.5 s`, `2:03` or `1:02:03`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def fail(message: str, error: BaseException | None = None) -> None:
    """An error message on stderr."""
    if _tracebacks and error is not None:
        err().print(_traceback(error), style="dim")
    err().print("error: ", style="bold red", end="")
    err().print(printable(redact(message), MAX_MESSAGE))


def fail_unexpectedly(error: BaseException) -> None:
    """A failure we did not foresee: one line, and how to see more."""
    text = " ".join(str(error).split())
    fail(f"{type(error).__name__}: {printable(text, 500)}", error)
    if not _tracebacks:
        note("this was not foreseen; `peft --debug ...` shows where it happened")


def _traceback(error: BaseException) -> str:
    return printable(redact("".join(traceback.format_exception(error))), MAX_MESSAGE)
