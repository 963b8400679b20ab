"""Where a base model is on this machine: a folder, a .gguf file, a Python package that carries one, the hub's cache.

Names come from adapter files, so places are only looked at: nothing is fetched, converted, imported or executed
(`training/locate.py` fetches and converts).
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from peftcli.errors import InputError, printable
from peftcli.files import cache_folder, open_regular, read_bounded, sha256, write_atomically

PACKAGE = "package:"
FORMAT = 1
"""Part of a converted file's name in the cache: a conversion that gives something else has another number."""

HUB_ID = re.compile(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95}){0,3}")
"""A model's id or a revision on the hub; what it never is: a path upwards."""


def find_base(name: str | None, revision: str | None, *, beside: Path) -> Path | None:
    """The folder of the base an adapter names, if it is on this machine and transformers can load it as it is.

    Args:
        name: `base_model_name_or_path`: a folder, a .gguf file, `package:NAME` or a hub id.
        revision: its revision on the hub.
        beside: the adapter's folder; relative names are tried from here and from the current folder.
    """
    if not name:
        return None
    if name.startswith(PACKAGE):
        try:
            return _ready(package_model(name.removeprefix(PACKAGE)))
        except InputError:
            return None
    for candidate in (Path(name), beside / name):
        if is_file(candidate / "config.json"):
            # Behind a link to a folder, `..` is not the folder before it in the path.
            return candidate.resolve() if ".." in candidate.parts else Path(os.path.normpath(candidate))
        if candidate.suffix == ".gguf" and is_file(candidate):
            return _ready(candidate)
    return _in_hub_cache(name, revision or "main")


def _ready(model: Path) -> Path | None:
    """A model's folder, or that of a .gguf file's conversion if there is one."""
    if model.is_dir():
        return model
    conversions = cache_folder() / "bases"
    if not any(conversions.glob(f"{_stem(model)}-*")):  # else the file need not be hashed
        return None
    try:
        folder = conversion_folder(model)
    except InputError:
        return None
    return folder if folder.is_dir() else None


def _in_hub_cache(name: str, revision: str) -> Path | None:
    if HUB_ID.fullmatch(name) is None or HUB_ID.fullmatch(revision) is None:
        return None
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    cached = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub") / f"models--{name.replace('/', '--')}"
    reference = cached / "refs" / revision
    commit = reference.read_text(encoding="utf-8", errors="replace").strip() if is_file(reference) else revision
    folder = cached / "snapshots" / commit
    return folder if is_file(folder / "config.json") else None


def is_file(path: Path) -> bool:
    """Whether there is a file; a name that no path can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with characters no path can have
        return False


def package_model(name: str) -> Path:
    """The one model inside an installed Python package, which is looked up and never imported.

    Args:
        name: of the package to import, or its name on PyPI where the two differ only in dashes.

    Returns:
        A .gguf file, or a folder with `config.json` beside safetensors.

    Raises:
        InputError: if the package is not installed, or has no such model, or several.
    """
    module = name.replace("-", "_")
    # A name with dots would import the packages around it.
    spec = find_spec(module) if module.isidentifier() and module != "__main__" else None
    if spec is None:
        raise InputError(
            f"there is no installed Python package {printable(name)!r}",
            field="model.name_or_path",
            fix=f"pip install {printable(name)}" if module.isidentifier() else "give a top-level package",
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    models = sorted({file.parent for folder in folders for file in folder.rglob("model*.safetensors")})
    found = files or [folder for folder in models if (folder / "config.json").is_file()]
    if len(found) != 1:
        raise InputError(
            f"the package {printable(name)} holds {len(found)} models",
            field="model.name_or_path",
            allowed=", ".join(map(printable, found)) or "a package with one .gguf file, or one folder of a model",
            fix="name one of them by its path" if found else None,
        )
    return found[0]


def conversion_folder(file: Path) -> Path:
    """Where the cache has, or would have, a .gguf file as a transformers model: its name and a hash of its content.

    Raises:
        InputError: if it is no GGUF file.
    """
    with open_regular(file) as stream:
        if stream.read(4) != b"GGUF":
            raise InputError("is no GGUF file", place=file, field="model.name_or_path")
    return cache_folder() / "bases" / f"{_stem(file)}-{_digest(file)[:16]}-{FORMAT}"


def _stem(file: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", file.stem)[:60].lstrip(".")


def _digest(file: Path) -> str:
    """SHA-256 of a file, kept under what the file system says of it: to hash gigabytes takes seconds.

    A file's change time can't be set, so that one with the same facts is the same.
    """
    state = file.stat()
    facts = (str(file.resolve()), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    kept = cache_folder() / "hashes" / hashlib.sha256(repr(facts).encode(errors="replace")).hexdigest()
    known = read_bounded(kept, 64).decode(errors="replace") if is_file(kept) else ""
    if re.fullmatch(r"[0-9a-f]{64}", known):
        return known
    digest = sha256(file)
    with suppress(OSError):  # where the cache can't be written, it is hashed again
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, digest)
    return digest
