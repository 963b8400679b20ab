"""A base model's weights, one at a time, as the matrices that adapters change."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.adapters.base import SiteShape
from peftcli.adapters.base_facts import STORED_TRANSPOSED, BaseFacts, read_base, weight_files
from peftcli.adapters.fingerprint import ROWS, config_facts
from peftcli.adapters.header import TensorInfo, read_header
from peftcli.adapters.values import FLOATS, read_array
from peftcli.errors import InputError
from peftcli.files import open_regular
from peftcli.merging.floats import rounded
from peftcli.merging.tensors import read_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

TABLES = (".embed_tokens.weight", ".wte.weight", ".word_embeddings.weight", ".embed_in.weight")
"""What the input embedding is called in a checkpoint."""


class BaseWeights:
    """Reads tensors of a base model's folder when they are asked for.

    Args:
        folder: a transformers model as safetensors.

    Raises:
        InputError: if it can't be read, or its weights are of another kind.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: BaseFacts = read_base(folder)
        self.files = {
            name: folder / file for file in weight_files(folder) for name in read_header(folder / file).tensors
        }
        if not self.files:
            raise InputError("has no safetensors weights", place=folder, field="--base")

    def fingerprint(self) -> dict[str, Any]:
        """What the files tell of which base this is; see `adapters/fingerprint.py`."""
        config = {**self.facts.language_config, "model_type": self.facts.config.get("model_type")}
        told: dict[str, Any] = {"config": config_facts(config)}
        tables = [name for name in self.files if f".{name}".endswith(TABLES)]
        table = self.facts.tensors[tables[0]] if len(tables) == 1 else None
        if table is not None and table.dtype in FLOATS and len(table.shape) == 2 and table.numel:
            vocabulary, size = table.shape
            count = min(ROWS, vocabulary)
            first = replace(table, shape=(count, size), stop=table.start + table.nbytes // vocabulary * count)
            with open_regular(self.files[table.name]) as file:
                told["embeddings"] = hashlib.sha256(rounded(read_array(file, first), "BF16").tobytes()).hexdigest()
        return told

    def find(self, name: str) -> TensorInfo | None:
        """A tensor by its name in the model; `info.name` is its name in the checkpoint."""
        return self.facts.find(name)

    def read(self, info: TensorInfo) -> Tensor:
        """A tensor as it is stored."""
        return read_tensor(self.files[info.name], info)

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the model."""
        info = self.find(name)
        if info is None:
            raise InputError(f"has no tensor {name}", place=self.folder, field="--base")
        return self.read(info)

    def array(self, name: str) -> NDArray[Any]:
        """A tensor by its name in the model, float32."""
        values: NDArray[Any] = self.tensor(name).float().numpy()
        return values

    def matrix(self, shape: SiteShape) -> Tensor:
        """The weight [out, in] of an adapted module, in float32."""
        name = f"{shape.name}.{'in_proj_weight' if shape.kind == 'attention' else 'weight'}"
        return to_matrix(self.tensor(name).float(), shape, self.facts)

    def stores_transposed(self, shape: SiteShape) -> bool:
        return stores_transposed(shape, self.facts)


def stores_transposed(shape: SiteShape, facts: BaseFacts) -> bool:
    """Whether the checkpoint holds the matrix [out, in] the other way round: embeddings, and GPT-2's Conv1D."""
    is_conv1d = facts.model_type in STORED_TRANSPOSED and not shape.name.endswith("lm_head")
    return shape.kind == "embedding" or (shape.kind == "linear" and is_conv1d)


def to_matrix(stored: Tensor, shape: SiteShape, facts: BaseFacts) -> Tensor:
    """A stored weight as the matrix [out, in]."""
    return stored.T if stores_transposed(shape, facts) else stored.flatten(1)


def to_stored(matrix: Tensor, stored: Sequence[int], shape: SiteShape, facts: BaseFacts) -> Tensor:
    """A matrix [out, in] as the checkpoint stores it, with the shape `stored`."""
    return (matrix.T if stores_transposed(shape, facts) else matrix.reshape(tuple(stored))).contiguous()
