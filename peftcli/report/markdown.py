"""Foreign text in Markdown."""

from __future__ import annotations

_MARKUP = frozenset("\\`*_{}[]<>#|~!$")


def inline(text: str) -> str:
    """Text in a line or a cell of Markdown, none of it markup."""
    line = " ".join(text.split())
    return "".join(f"\\{character}" if character in _MARKUP else character for character in line)
