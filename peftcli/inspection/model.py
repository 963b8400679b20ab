"""A model as a folder: what a run of `method: full` or an export leaves, a checkpoint of such a run, or a base itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from peftcli.adapters.audit_modules import Contents
from peftcli.adapters.audit_values import check_values
from peftcli.adapters.base_facts import weight_files
from peftcli.adapters.findings import Findings
from peftcli.adapters.header import read_header
from peftcli.adapters.keys import Key
from peftcli.errors import InputError
from peftcli.files import read_strict_json
from peftcli.inspection.summary import tensor_rows
from peftcli.inspection.training import training_facts
from peftcli.names import MODEL_CONFIG, RECIPE, TRAINABLE


def model_summary(folder: Path) -> dict[str, Any]:
    """Everything `peft inspect` says about a model, from its config and its tensors' headers.

    Raises:
        InputError: its config or a file of weights can't be read, or it has none.
    """
    files = _files(folder)
    if not files:
        raise InputError("holds a config.json, but no safetensors files of a model", place=folder)
    config = read_strict_json(folder / MODEL_CONFIG) if (folder / MODEL_CONFIG).is_file() else {}
    tensors = [tensor for name in files for tensor in read_header(folder / name).tensors.values()]
    return {
        "kind": "model",
        "path": str(folder),
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
        "base": _base(folder) or _base(folder.parent),
        "file": files[0] if len(files) == 1 else f"{len(files)} files",
        "bytes": sum((folder / name).stat().st_size for name in files),
        "tensors": len(tensors),
        "parameters": sum(tensor.numel for tensor in tensors),
        "dtypes": dict(Counter(tensor.dtype for tensor in tensors).most_common()),
        "metadata": {},
        "training": training_facts(folder),
        "errors": [],
        "doubts": [],
    }


def model_rows(folder: Path) -> list[dict[str, Any]]:
    """Every tensor, file by file."""
    return [row for name in _files(folder) for row in tensor_rows(folder / name)]


def model_problems(folder: Path) -> list[str]:
    """What is wrong with the weights' values: NaN, infinite, empty. Constants and zeros are usual in a model.

    Raises:
        InputError: as above.
    """
    model_summary(folder)
    problems: list[str] = []
    for name in _files(folder):
        file, findings = read_header(folder / name), Findings(folder / name)
        others = [(Key(tensor, "", tensor, False), info) for tensor, info in file.tensors.items()]
        check_values(file, Contents(others=others), findings)
        problems += [str(error) for error in findings.errors]
    return problems


def _files(folder: Path) -> list[str]:
    """Names of the files with its weights; a checkpoint of a run has them without a config."""
    return [TRAINABLE] if (folder / TRAINABLE).is_file() else weight_files(folder)


def _base(folder: Path) -> str | None:
    """The base that was trained, where the folder is a run's."""
    if not (folder / RECIPE).is_file():
        return None
    from peftcli.recipe.load import load_recipe  # reads the schema, which other models need not wait for

    try:
        return load_recipe(folder / RECIPE, check_paths=False).model.name_or_path
    except InputError:
        return None  # a recipe of the user's own, or of another program
