"""An audited adapter as plain values: what `peft inspect` prints and what `--json` writes."""

from __future__ import annotations

from collections import Counter
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from peftcli.adapters.audit import Audit
from peftcli.adapters.config import CONFIG_NAME, PeftConfig, TunerConfig
from peftcli.adapters.fit import Fit
from peftcli.adapters.header import TensorFile, read_header
from peftcli.adapters.pickle_header import read_pickle_header
from peftcli.adapters.targets import layer_index
from peftcli.errors import InputError
from peftcli.inspection.training import training_facts
from peftcli.names import MODEL_CONFIG, TRAINABLE

SUFFIXES = {".yaml": "recipe", ".yml": "recipe", ".safetensors": "tensors", ".bin": "tensors"}
ALLOWED = "an adapter's or a model's directory, a .safetensors file or a recipe (.yaml)"

SHOWN_ELSEWHERE = frozenset(
    {
        *("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
        *("target_modules", "modules_to_save", "r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    }
)


def adapter_summary(audit: Audit) -> dict[str, Any]:
    """Everything `peft inspect` says about an adapter without being asked for more."""
    config = audit.config
    return {
        "kind": "adapter",
        "path": str(audit.folder),
        "method": config.peft_type,
        "task_type": getattr(config.task_type, "value", config.task_type),
        "base": {
            "name": config.base_model_name_or_path,
            "revision": config.revision,
            "folder": str(audit.base.folder) if audit.base else None,
            "model_type": audit.base.model_type if audit.base else None,
        },
        "r": getattr(config, "r", None),
        "lora_alpha": getattr(config, "lora_alpha", None),
        "scaling": sorted({_scaling(fit) for fit in audit.modules.values()}),
        "options": options(config),
        "target_modules": config.to_dict()["target_modules"] if isinstance(config, TunerConfig) else None,
        "modules": len(audit.modules),
        "layers": len({layer_index(path) for path in audit.modules} - {None}),
        "targets": target_rows(audit),
        "trained_in_full": sorted(audit.copies),
        **file_summary(audit.file),
        "training": training_facts(audit.folder),
        **findings_summary(audit),
    }


def findings_summary(audit: Audit) -> dict[str, list[str]]:
    return {"errors": [str(error) for error in audit.errors], "doubts": [str(doubt) for doubt in audit.doubts]}


def file_summary(file: TensorFile) -> dict[str, Any]:
    """Counts and sizes of a file of tensors."""
    tensors = file.tensors.values()
    return {
        "file": file.path.name,
        "bytes": file.size,
        "tensors": len(file.tensors),
        "parameters": sum(tensor.numel for tensor in tensors),
        "dtypes": dict(Counter(tensor.dtype for tensor in tensors).most_common()),
        "metadata": file.metadata,
    }


def tensor_rows(path: Path) -> list[dict[str, Any]]:
    """Every tensor of a file, in the order of their bytes."""
    file = read_pickle_header(path) if path.suffix == ".bin" else read_header(path)
    return [
        {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape), "bytes": tensor.nbytes}
        for tensor in file.tensors.values()
    ]


def options(config: PeftConfig) -> dict[str, Any]:
    """The config's fields that are not as PEFT would set them and that no other line shows."""
    values = config.to_dict()
    result = {}
    for item in fields(config):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if item.name in values and item.name not in SHOWN_ELSEWHERE and getattr(config, item.name) != default:
            result[item.name] = values[item.name]
    return result


def target_rows(audit: Audit) -> list[dict[str, Any]]:
    """Adapted modules that are alike in name, size, rank and scaling, one row each."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path, fit in audit.modules.items():
        name = path.rpartition(".")[2]
        rank = getattr(fit.adapter, "r", None)
        parameters = sum(tensor.numel for tensor in audit.found[path].values())
        key = (name, fit.shape.kind, fit.shape.in_features, fit.shape.out_features, rank, _scaling(fit))
        row = rows.setdefault(
            key,
            {
                "module": name,
                "kind": fit.shape.kind,
                "count": 0,
                "in": fit.shape.in_features or None,
                "out": fit.shape.out_features or None,
                "r": rank,
                "scaling": _scaling(fit),
                "parameters": 0,
            },
        )
        row["count"] += 1
        row["parameters"] += parameters
    return sorted(rows.values(), key=lambda row: (row["module"], row["r"] or 0))


def _scaling(fit: Fit) -> float:
    return float(fit.adapter.scaling)


def kind_of(path: Path) -> str:
    """What a path is to be inspected as: `adapter` or `model` (folders), `recipe` or `tensors` (bare files).

    Raises:
        InputError: if there is nothing there.
    """
    try:
        if path.is_dir():
            is_model = any((path / name).is_file() for name in (MODEL_CONFIG, TRAINABLE))
            return "model" if is_model and not (path / CONFIG_NAME).exists() else "adapter"
        if not path.exists() and not path.is_symlink():
            raise InputError("does not exist", place=path, allowed=ALLOWED)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("is no path a file can have", place=path) from error
    kind = SUFFIXES.get(path.suffix)
    if kind is None:
        raise InputError("is a file, but no recipe and no .safetensors", place=path, allowed=ALLOWED)
    return kind
