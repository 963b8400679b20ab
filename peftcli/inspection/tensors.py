"""A file of tensors on its own, without a config that says what they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftcli.adapters.audit_modules import Contents
from peftcli.adapters.audit_values import check_values
from peftcli.adapters.findings import Findings
from peftcli.adapters.header import read_header
from peftcli.adapters.keys import Key
from peftcli.adapters.pickle_header import read_pickle_header
from peftcli.errors import InputError
from peftcli.inspection.summary import file_summary


def tensors_summary(path: Path) -> tuple[dict[str, Any], list[InputError]]:
    """What a `.safetensors` (or `.bin`) file holds, and what is wrong with its values.

    Raises:
        InputError: if it is no such file.
    """
    file = read_pickle_header(path) if path.suffix == ".bin" else read_header(path)
    findings = Findings(path)
    others = [(Key(name, "", name, False), tensor) for name, tensor in file.tensors.items()]
    check_values(file, Contents(others=others), findings)
    errors = findings.errors
    summary = {
        "kind": "tensors",
        "path": str(path),
        **file_summary(file),
        "errors": [str(error) for error in errors],
        "doubts": [str(doubt) for doubt in findings.doubts],
    }
    return summary, errors
