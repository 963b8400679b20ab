"""Paths of a recipe: input paths start in the folder of the file that names them, output paths in the current folder."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from peftcli.data.readers import is_data_file
from peftcli.errors import InputError, printable
from peftcli.recipe.nodes import Location, Node, dotted, walk

if TYPE_CHECKING:
    from peftcli.recipe.schema import Recipe

OUTPUT = ("training", "output_dir")
BASE = ("model", "name_or_path")
RESUME = ("training", "resume_from_checkpoint")
EXPERTS = ("adapter", "adapters")  # X-LoRA's
LAUNCHER_FILE = ("launcher", "config")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)
PACKAGE = re.compile(r"package:[A-Za-z_][\w.-]{0,95}", re.ASCII)


def make_absolute(root: Node) -> None:
    """Replace every path in the tree by an absolute one. Names on the hub and of packages stay as they are.

    Raises:
        InputError: a path that would not be what was meant: output_dir is a file if read as an input path would be,
            or the shell's `~` and `$NAME`, or an address.
    """
    for location, node in walk(root):
        if not isinstance(node.value, str) or not node.value:
            continue
        if location == OUTPUT:
            _refuse_input(node)
            _refuse_shorthand(location, node, Path.cwd())
            node.value = os.path.abspath(node.value)
        elif (location == RESUME and node.value != "auto") or _is_input_path(location, node):
            _refuse_shorthand(location, node, node.origin.folder)
            node.value = os.path.abspath(node.origin.folder / node.value)


def problems(recipe: Recipe) -> Iterator[tuple[Location, str, str | None]]:
    """Location, problem and advice for every path that cannot be what it should be."""
    yield from _base(recipe.model.name_or_path)
    for name, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for index, source in enumerate(sources if isinstance(sources, tuple) else ()):
            yield from (((("data", name, index, "path")), *found) for found in _data(source.path))
    yield from _output(Path(recipe.training.output_dir), Path(recipe.model.name_or_path))
    resume = recipe.training.resume_from_checkpoint
    if resume not in (None, "auto") and not os.path.isdir(resume):
        yield RESUME, f"{_shown(resume)} is not a folder", "`auto` takes the newest valid checkpoint of output_dir"
    config = recipe.launcher.config
    if config is not None and os.path.isabs(config) and not os.path.isfile(config):
        yield LAUNCHER_FILE, f"{_shown(config)} is not a file", None
    elif config is not None and recipe.launcher.type != "none":
        from peftcli.launchers.configs import find

        try:
            find({"auto": "accelerate"}.get(recipe.launcher.type, recipe.launcher.type), config)
        except InputError as error:
            yield LAUNCHER_FILE, error.problem, error.fix


def _refuse_input(node: Node) -> None:
    seen_from_recipe = node.origin.folder / str(node.value)
    if os.path.isfile(seen_from_recipe):  # False, not an error, for a name that is too long
        problem = f"{_shown(seen_from_recipe)} is a file: a run needs a folder"
        raise InputError(problem, place=node.place, field=dotted(OUTPUT), fix="output_dir starts in the current folder")


def _refuse_shorthand(location: Location, node: Node, folder: Path) -> None:
    text = str(node.value)
    if os.path.exists(folder / text):  # a strange name, but a name
        return
    if re.match(r"~|.*\$(\w|\{)", text):
        raise InputError(
            f"{_shown(text)} is taken as it stands: `~` and `$NAME` are not expanded",
            place=node.place,
            field=dotted(location),
            fix='write the path out; on the command line the shell can: field="$HOME/..."',
        )
    if re.match(r"[a-z][a-z0-9+.-]{1,20}://", text, re.IGNORECASE):
        raise InputError(
            f"{_shown(text)} is an address, not a path",
            place=node.place,
            field=dotted(location),
            fix="download it first, or name what is on the Hugging Face hub as OWNER/NAME",
        )


def _is_input_path(location: Location, node: Node) -> bool:
    text = str(node.value)
    if location[:2] == EXPERTS:
        return _is_local(text, node.origin.folder)
    if location == BASE:
        return not PACKAGE.fullmatch(text) and _is_local(text, node.origin.folder)
    if location == LAUNCHER_FILE:
        return "/" in text or text.endswith((".yaml", ".yml", ".json"))
    is_data = location[:2] in (("data", "train"), ("data", "eval")) and (
        len(location) == 2 or isinstance(location[-1], int) or location[-1] == "path"
    )
    return is_data and (is_data_file(Path(text)) or _is_local(text, node.origin.folder))


def _is_local(text: str, folder: Path) -> bool:
    """Whether `text` is a path rather than the name of something on the hub."""
    return text.startswith(("/", ".", "~")) or not HUB_ID.fullmatch(text) or (folder / text).exists()


def _base(text: str) -> Iterator[tuple[Location, str, str | None]]:
    if not os.path.isabs(text):
        return  # a package or a name on the hub, looked up when it is loaded
    if os.path.isdir(text) or (os.path.isfile(text) and text.endswith(".gguf")):
        return
    kind = "is neither a folder nor a .gguf file" if os.path.exists(text) else "does not exist"
    yield BASE, f"{_shown(text)} {kind}", "a hub id, a folder, a .gguf file, or package:NAME"


def _data(text: str) -> Iterator[tuple[str, str | None]]:
    if not os.path.isabs(text):
        return
    try:
        mode = os.stat(text).st_mode
    except OSError as error:
        yield f"{_shown(text)} cannot be read: {error.strerror}", "data paths start in the recipe's folder"
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        yield f"{_shown(text)} is neither a file nor a folder", None
    elif stat.S_ISREG(mode) and not is_data_file(Path(text)):
        yield f"{_shown(text)} is no data set by its name", "JSON Lines, JSON, CSV, Parquet or Arrow"


def _output(path: Path, base: Path) -> Iterator[tuple[Location, str, str | None]]:
    crowded = {place for used in (Path.home(), Path.cwd()) for place in (used, *used.parents)}
    if path in crowded or path == base:
        yield OUTPUT, f"{_shown(path)} is no folder for a run", "give each run a folder of its own, e.g. out/run"
    if not path.name.strip() or not str(path).isprintable() or any(len(os.fsencode(part)) > 255 for part in path.parts):
        yield OUTPUT, f"{printable(repr(str(path)), 80)} is no name for a folder", None
        return
    for part in (path, *path.parents):
        if os.path.lexists(part):
            if not part.is_dir():
                yield OUTPUT, f"{_shown(part)} exists and is not a folder", None
            return


def _shown(path: str | Path) -> str:
    return printable(path)
