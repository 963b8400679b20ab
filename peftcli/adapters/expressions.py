"""Regular expressions from files that nobody vouches for: refused if they can take exponential time, and timed anyway.

A name of forty characters and `(a+)+b` keep Python's `re`, and so every PEFT that reads the file, busy for hours.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from typing import Any

from peftcli.errors import InputError, printable

if sys.version_info >= (3, 11):
    from re import _parser as parser  # the only way to an expression's structure, here only looked at
else:
    import sre_parse as parser

MAX_LENGTH = 1 << 16  # characters; one that names every layer of a large model has half of that
EXPRESSION_SECONDS = 2.0  # for one expression on one name; honest ones take microseconds


def fullmatch(pattern: str, name: str, *, field: str) -> bool:
    """Whether the regular expression matches the whole name.

    Raises:
        InputError: if the expression is broken, or too slow to be an honest one.
    """
    import regex  # like `re`, but with a time limit

    fault = expression_fault(pattern)
    if fault:
        raise InputError(
            f"{printable(pattern)!r} {fault}", field=field, fix="a list of module names needs no expression"
        )
    try:
        return regex.fullmatch(pattern, name, timeout=EXPRESSION_SECONDS) is not None
    except regex.error as error:
        raise InputError(f"{printable(pattern)!r} is not a regular expression: {error}", field=field) from error
    except TimeoutError as error:
        raise InputError(f"{printable(pattern)!r} takes too long on {printable(name)!r}", field=field) from error


@lru_cache(maxsize=4096)
def expression_fault(pattern: str) -> str | None:
    """What is wrong with an expression, or None."""
    if len(pattern) > MAX_LENGTH:
        return f"has {len(pattern):,} characters, more than {MAX_LENGTH:,}"
    try:
        explodes = _explodes(parser.parse(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression: {error}"
    return "can take exponential time: it repeats something that repeats itself" if explodes else None


def _explodes(tree: Any) -> bool:
    """Whether some repetition has another one as its whole body, as in `(a+)+`: then n letters split in 2^n ways."""
    for operation, argument in tree:
        body = argument[2] if _is_endless(operation, argument) else None
        if body is not None and _repeats_alone(body):
            return True
        if any(_explodes(part) for part in _parts(argument)):
            return True
    return False


def _repeats_alone(tree: Any) -> bool:
    """Whether an endless repetition can make up all of what this part matches."""
    needed = [item for item in tree if not _can_be_empty(tree, item)]
    candidates = needed if len(needed) == 1 else [] if needed else tree
    return any(
        _is_endless(operation, argument) or any(_repeats_alone(part) for part in _parts(argument))
        for operation, argument in candidates
    )


def _is_endless(operation: Any, argument: Any) -> bool:
    return str(operation) in ("MAX_REPEAT", "MIN_REPEAT") and argument[1] is parser.MAXREPEAT


def _can_be_empty(tree: Any, item: Any) -> bool:
    return parser.SubPattern(tree.state, [item]).getwidth()[0] == 0


def _parts(argument: Any) -> list[Any]:
    """The parts of an expression within an operation's argument, however it holds them."""
    if isinstance(argument, parser.SubPattern):
        return [argument]
    if isinstance(argument, (tuple, list)):
        return [part for item in argument for part in _parts(item)]
    return []
