"""Errors the command line turns into one clear message and an exit code.

Everything a user can get wrong raises `InputError`: it names the file, the place, the value, what is allowed and what
to do. It is a `ValueError`, so that Python callers who catch PEFT's `ValueError` keep working.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2

MAX_SHOWN = 200  # characters of a foreign string that a message repeats


class PeftCliError(Exception):
    """Base of all errors we raise on purpose; the command line shows its text and no traceback."""

    exit_code = EXIT_FAILURE


PeftError = PeftCliError
"""PEFT's name."""


class RunError(PeftCliError):
    """A run that started and failed (disk full, non-finite loss, a dead rank)."""


class InputError(PeftCliError, ValueError):
    """Bad input: a recipe, data set, adapter, base model or argument that can't be used as it is.

    Args:
        problem: what is wrong, in one sentence.
        place: where: `recipe.yaml:7:3`, a file, a tensor or a module name.
        field: dotted name of the field, e.g. `adapter.r`.
        allowed: what would have been accepted.
        fix: what to do next.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(
        self,
        problem: str,
        *,
        place: str | Path | None = None,
        field: str | None = None,
        allowed: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.problem, self.place, self.field, self.allowed, self.fix = problem, place, field, allowed, fix
        head = ": ".join(printable(part, limit=2000) for part in (place, field, problem) if part)
        tail = [
            f"  {label}: {printable(text, limit=2000)}" for label, text in (("allowed", allowed), ("fix", fix)) if text
        ]
        super().__init__("\n".join([head, *tail]))

    def at(self, *, place: str | Path | None = None, field: str | None = None, fix: str | None = None) -> InputError:
        """The same problem, told with another place, field or fix."""
        return InputError(
            self.problem,
            place=place or self.place,
            field=field or self.field,
            allowed=self.allowed,
            fix=fix or self.fix,
        )


class NoMatchingPeftModuleError(InputError):
    """A config that matches no module of the base."""


class PeftWarning(UserWarning):
    """A config says something that has no effect on this base."""


class ArgumentTypeError(InputError, TypeError):
    """An argument of the wrong type: a `ValueError` to PEFT 0.13, a `TypeError` today."""


class InputErrors(InputError):
    """Several problems found in one pass (all bad tensors of a file, all bad fields of a recipe)."""

    def __init__(self, problems: Iterable[InputError], *, most: int = 20) -> None:
        self.problems = list(problems)
        shown = [str(problem) for problem in self.problems[:most]]
        if len(self.problems) > most:
            shown.append(f"... and {len(self.problems) - most} more")
        Exception.__init__(self, "\n".join(shown))


@dataclass(frozen=True)
class Suggestion:
    """The nearest known name to a misspelt one, or nothing."""

    name: str | None

    def __str__(self) -> str:
        return f"did you mean `{self.name}`?" if self.name else ""


def nearest(name: str, known: Iterable[str]) -> Suggestion:
    """The known name closest to `name`, if one is close enough to be a misspelling."""
    matches = get_close_matches(name[:MAX_SHOWN], list(known), n=1, cutoff=0.6)
    return Suggestion(matches[0] if matches else None)


def printable(text: object, limit: int = MAX_SHOWN) -> str:
    """`text` made safe for a terminal or a card: control, bidi and other invisible characters escaped, long text cut."""
    raw = str(text)
    cut = raw[:limit]
    safe = "".join(
        character if character in "\n\t" or unicodedata.category(character)[0] != "C" else _escape(character)
        for character in cut
    )
    return safe if len(raw) <= limit else f"{safe}... ({len(raw)} characters)"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
