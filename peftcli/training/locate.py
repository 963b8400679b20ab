"""Where a base model is: a folder, a .gguf file, a Python package that carries one, or the hub."""

from __future__ import annotations

import re
from pathlib import Path

from peftcli.adapters.base_places import PACKAGE, find_base, package_model
from peftcli.adapters.config import CONFIG_NAME, read_config
from peftcli.errors import InputError, printable
from peftcli.training.gguf import converted

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
HUB_UNUSED = ["*/*", "consolidated*"]
"""Folders of other formats, and Mistral's second copy of the weights."""


def resolve_base(name_or_path: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Path:
    """The folder of a base model; downloaded or converted if need be.

    Args:
        name_or_path: a folder, a .gguf file, `package:NAME` (the model in an installed Python package), or a hub id.
        revision: branch, tag or commit, for a hub id.
        trust_remote_code: fetch the Python files of a hub id, too.

    Raises:
        InputError: if there is no such base, or it can't be had.
    """
    if name_or_path.startswith(PACKAGE):
        found = package_model(name_or_path.removeprefix(PACKAGE))
        return found if found.is_dir() else converted(found)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf" and path.is_file():
        return converted(path)
    if HUB_ID.fullmatch(name_or_path) is None:
        raise InputError(
            f"{printable(name_or_path)} is neither a folder nor a .gguf file",
            field="model.name_or_path",
            allowed=f"a hub id, a folder, a .gguf file, or {PACKAGE}NAME",
        )
    return _snapshot(name_or_path, revision, HUB_FILES + ["*.py"] * trust_remote_code)


def base_of(adapter: Path) -> Path:
    """The folder of the base an adapter names; downloaded or converted if need be.

    Args:
        adapter: the adapter's folder.

    Raises:
        InputError: if it names none, or that can't be had.
    """
    config = read_config(adapter / CONFIG_NAME)
    name, field = config.base_model_name_or_path, "base_model_name_or_path"
    if not name:
        raise InputError("the adapter does not say which base it belongs to", place=adapter, fix="name it: --base BASE")
    if found := find_base(name, config.revision, beside=adapter):
        return found
    try:
        return resolve_base(name, config.revision)
    except InputError as error:
        raise error.at(
            place=adapter / CONFIG_NAME,
            field=field,
            fix="; ".join([*([error.fix] if error.fix else []), "or say where the base is: --base FOLDER"]),
        ) from error


def _snapshot(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    def refuse(problem: str, fix: str) -> InputError:
        return InputError(f"{printable(name)} {problem}", field="model.name_or_path", fix=fix)

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=HUB_UNUSED))
    except errors.GatedRepoError as error:
        raise refuse("is gated", "ask for access on its page, then: hf auth login") from error
    except errors.RevisionNotFoundError as error:
        raise refuse(f"has no revision {printable(revision)}", "name one that its page lists") from error
    except errors.RepositoryNotFoundError as error:
        raise refuse("is no model on the hub", "check the name; for a private one: hf auth login") from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        if constants.is_offline_mode():
            problem = "is not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it"
        else:
            problem = (
                f"is not on this machine, and can't be fetched from the hub: {printable(str(error).splitlines()[0])}"
            )
        raise refuse(problem, "fetch it where there is a network: hf download " + printable(name)) from error
