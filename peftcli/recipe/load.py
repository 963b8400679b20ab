"""From a recipe file and overrides to a `Recipe`, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from peftcli.errors import InputError, InputErrors, printable
from peftcli.recipe import overrides as dotlist
from peftcli.recipe import paths, yaml12
from peftcli.recipe.nodes import Node, merge
from peftcli.recipe.problems import located, problem
from peftcli.recipe.redact import redact
from peftcli.recipe.schema import Recipe

MAX_EXTENDS = 10


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, check_paths: bool = True) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        path: the recipe file.
        overrides: `field=value` and `~field`, applied in order after `extends`.
        check_paths: whether inputs must exist; the worker, which reads only the run folder, does not ask.

    Raises:
        InputErrors: naming file, line, column and field of every problem found.
    """
    return build(read_tree(path, overrides), check_paths=check_paths)


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> Node:
    """A recipe's values as they were written, those it extends below them and overrides on top.

    Raises:
        InputErrors: it is no YAML of the kind we read, or an override says nothing.
    """
    root = _read(Path(path), ())
    dotlist.apply(root, list(overrides))
    return root


def build(root: Node, *, check_paths: bool = True) -> Recipe:
    """The recipe that a tree of values is. The tree's paths become absolute.

    Raises:
        InputErrors: naming file, line, column and field of every problem found.
    """
    paths.make_absolute(root)
    try:
        recipe = Recipe.model_validate(root.plain())
    except ValidationError as error:
        raise InputErrors(located(error.errors(include_url=False), root)) from None
    found = paths.problems(recipe) if check_paths else ()
    if problems := [problem(location, text, root, fix=fix) for location, text, fix in found]:
        raise InputErrors(problems)
    return recipe


@contextmanager
def placed(root: Node) -> Iterator[None]:
    """While open, what turns out only later to be wrong with a field (a base that isn't there) is told with its line."""
    try:
        yield
    except InputErrors as errors:
        raise InputErrors(_placed(error, root) for error in errors.problems) from errors
    except InputError as error:
        raise _placed(error, root) from error


def _placed(error: InputError, root: Node) -> InputError:
    """The error with the place of its field, where it has none and the field is a recipe's."""
    field = error.field or ""
    if error.place or field.partition(".")[0] not in Recipe.model_fields:
        return error
    return error.at(place=root.nearest(field.split(".")).place)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, all defaults in, secrets out; loading it gives an equal recipe."""
    values = _plain(recipe.model_dump())
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 16)


def _read(path: Path, chain: tuple[Path, ...]) -> Node:
    """The file's tree laid over those it extends."""
    root = yaml12.read(path)
    if not isinstance(root.value, dict):
        kind = "a list" if isinstance(root.value, list) else f"the value {printable(repr(root.value), 40)}"
        raise InputError(f"holds {kind}, not a map of sections", place=root.place, allowed=", ".join(_sections()))
    below = root.value.pop("extends", None)
    if below is None:
        return root
    if not isinstance(below.value, str) or not below.value:
        raise InputError(f"{printable(repr(below.plain()), 80)} is not a path", place=below.place, field="extends")
    target, chain = below.origin.folder / below.value, (*chain, path.resolve())
    if target.resolve() in chain or len(chain) > MAX_EXTENDS:
        why = "comes back to itself" if target.resolve() in chain else f"goes through more than {MAX_EXTENDS} files"
        names = " -> ".join(printable(item.name, 60) for item in (*chain, target))
        raise InputError(f"{why}: {names}", place=below.place, field="extends")
    try:
        return merge(_read(target, chain), root)
    except InputError as error:
        if target.exists():
            raise
        raise InputError(error.problem, place=below.place, field="extends") from None


def _sections() -> Iterator[str]:
    return iter(Recipe.model_fields)


def _plain(value: Any) -> Any:
    """Values as YAML has them, secrets taken out."""
    if isinstance(value, dict):
        return {redact(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return redact(value) if isinstance(value, str) else value


class _Dumper(yaml.SafeDumper):
    """Writes YAML that means the same in 1.1 and 1.2."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_PLAIN = re.compile(r"[A-Za-z_/][\w./@+-]*")


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = _PLAIN.fullmatch(text) is not None and yaml12.resolve(text) == text
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)
