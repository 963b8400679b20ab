"""What a check found, gathered: the same thing said of many tensors becomes one message."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from peftcli.errors import InputError, printable


@dataclass
class Findings:
    """Errors make a thing unusable or wrong; doubts deserve a look.

    Attributes:
        place: the file the findings are about, unless one says otherwise.
    """

    place: Path
    _errors: dict[tuple[str, str | None], list[str]] = field(default_factory=dict)
    _doubts: dict[tuple[str, str | None], list[str]] = field(default_factory=dict)
    _foreign_errors: list[InputError] = field(default_factory=list)

    def error(self, text: str, name: str = "", *, fix: str | None = None) -> None:
        """Note an error about a tensor or module `name`, or about the whole file."""
        self._errors.setdefault((text, fix), []).append(name)

    def doubt(self, text: str, name: str = "", *, fix: str | None = None) -> None:
        self._doubts.setdefault((text, fix), []).append(name)

    def add(self, error: InputError, place: Path) -> None:
        """Note an error another part raised, giving it a place if it has none."""
        if error.place is None and type(error) is InputError:
            error = error.at(place=place)
        self._foreign_errors.append(error)

    @property
    def errors(self) -> list[InputError]:
        return [*self._foreign_errors, *self._messages(self._errors)]

    @property
    def doubts(self) -> list[InputError]:
        return self._messages(self._doubts)

    def _messages(self, groups: dict[tuple[str, str | None], list[str]]) -> list[InputError]:
        return [
            InputError(text, place=self.place, field=_listed(names) or None, fix=fix)
            for (text, fix), names in groups.items()
        ]


def _listed(names: list[str]) -> str:
    """The first of several names and how many more there are."""
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return printable(names[0]) + more
