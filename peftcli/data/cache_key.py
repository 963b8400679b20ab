"""What decides which tokens a data set becomes, as one name: files, tokenizer, settings, date, and our own code."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli import __version__
from peftcli.data.sources import PART_SPLITS, source_files
from peftcli.errors import InputError
from peftcli.files import sha256

if TYPE_CHECKING:
    from peftcli.recipe.schema import DataSection

LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy", "pyarrow")
"""What reads, renders, tokenises and draws samples."""

_NOW = re.compile(r"strftime_now\s*\(\s*(?:'([^']*)'|\"([^\"]*)\")\s*\)")
_ASKED_FOR = re.compile(r"strftime_now\s+is\s+(?:not\s+)?defined")
_OF_THE_DAY = re.compile(r"(?:[^%]|%[-_]?[aAbBdmyYjUWuwGVhDFxeC%])*")
"""A format of `strftime` that gives the same all day."""
_BY_CHANCE = re.compile(r"\|\s*random\b|\blipsum\b")


class DataKey:
    """Data, and all that decides how `prepare` tokenises them.

    Args:
        data: the recipe's section, paths absolute.
        tokenizer: a transformers tokenizer.
        arguments: the other arguments of `prepare` that decide something.
        today: the date that chat templates are told.
    """

    def __init__(self, data: DataSection, tokenizer: Any, *, today: date | None = None, **arguments: Any) -> None:
        self.data, self.tokenizer, self.arguments = data, tokenizer, arguments
        self.today = today or date.today()

    def useless(self) -> str | None:
        """Why keeping the data would be no use, or None."""
        if not self.data.cache:
            return "data.cache is false"
        if self.data.streaming:
            return "the data are a stream"
        if not getattr(self.tokenizer, "is_fast", False):
            return "the tokenizer is a program, whose code is not looked into"
        if type(self.tokenizer).__module__.startswith("transformers_modules"):
            return "the tokenizer is a program that came with the base"
        template = self._template
        if _BY_CHANCE.search(template):
            return "the chat template draws by chance"
        formats = ["".join(found) for found in _NOW.findall(template)]
        unclear = "strftime_now" in _NOW.sub("", _ASKED_FOR.sub("", template))
        if unclear or not all(map(_OF_THE_DAY.fullmatch, formats)):
            return "the chat template writes the time of the day"
        try:
            self._states  # noqa: B018
        except (InputError, OSError):
            return "the files can't be read"  # reading their rows says why
        return None

    def name(self) -> str:
        """64 hexadecimal digits."""
        facts = {
            "program": [__version__, _digest_of_code(), {name: version(name) for name in LIBRARIES}],
            "data": self.data.model_dump(mode="json", exclude={"cache", "packing"}),  # packing is the loop's
            "arguments": self.arguments,
            "tokenizer": _facts(self.tokenizer),
            "today": str(self.today) if "strftime_now" in self._template else None,
            "files": [[part, str(path), sha256(path)] for part, path, _ in self._states],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def changed(self) -> bool:
        """Whether a file, or the day, is another than when the name was made."""
        return self._look() != self._states or date.today() != self.today

    @property
    def _template(self) -> str:
        """All chat templates of the tokenizer."""
        template = self.tokenizer.chat_template or ""
        return template if isinstance(template, str) else "\n".join(template.values())

    @cached_property
    def _states(self) -> list[tuple[str, Path, tuple[int, ...]]]:
        return self._look()

    def _look(self) -> list[tuple[str, Path, tuple[int, ...]]]:
        """Part, path and state of each file that holds rows."""
        found: list[tuple[str, Path, tuple[int, ...]]] = []
        for part, splits in PART_SPLITS.items():
            sources = getattr(self.data, part)
            for source in sources if isinstance(sources, tuple) else ():
                for file in source_files(source, splits):
                    state = file.stat()
                    found.append((part, file, (state.st_ino, state.st_size, state.st_mtime_ns)))
        return found


def _facts(tokenizer: Any) -> list[Any]:
    """All that a fast tokenizer's work depends on, wherever it was read from."""
    return [
        type(tokenizer).__qualname__,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        tokenizer.model_input_names,
        tokenizer.init_kwargs,
    ]


def _digest_of_code() -> str:
    """Of this package, whose every change may change what it makes."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
