"""Golden cases: adapters made by real PEFT, with what they must compute."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Golden:
    """One case of shared/golden."""

    folder: Path
    facts: dict[str, Any]

    def base(self) -> torch.nn.Module:
        import transformers

        folder = self.folder.parents[1] / "bases" / self.facts["base"]
        return (
            getattr(transformers, self.facts["auto_class"]).from_pretrained(folder, attn_implementation="eager").eval()
        )

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def inputs(self) -> dict[str, Tensor]:
        own = self.folder / "inputs.safetensors"
        return load_file(
            own if own.exists() else self.folder.parents[1] / "bases" / self.facts["base"] / "inputs.safetensors"
        )

    def expected(self) -> dict[str, Tensor]:
        return load_file(self.folder / "expected.safetensors")

    def __str__(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"


def find(shared: Path) -> dict[str, Golden]:
    """All cases by `peft-<version>/<case>`."""
    found = (
        Golden(path.parent, json.loads(path.read_text())) for path in sorted(shared.glob("golden/peft-*/*/case.json"))
    )
    return {str(case): case for case in found}


def forward(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state
