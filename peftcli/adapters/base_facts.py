"""What is known about a base model without loading it: its config and the names and shapes of its weights.

Names come from adapter files, so a base is only ever looked at: a folder's `config.json` and safetensors headers are
read strictly; nothing is downloaded, imported or executed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peftcli.adapters.base import SiteShape
from peftcli.adapters.base_places import is_file
from peftcli.adapters.header import TensorInfo, read_header
from peftcli.adapters.values import FLOATS
from peftcli.errors import InputError, printable
from peftcli.files import read_strict_json

MAX_INDEX_BYTES = 64 << 20
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

STORED_TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
"""Model types whose linear layers are Conv1D: the weight is stored [in, out]."""

EMBEDDINGS = frozenset({"embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "embed_in", "shared"})
"""What transformers calls tables of embeddings."""


@dataclass(frozen=True)
class BaseFacts:
    """A base model's config and tensors.

    Attributes:
        folder: where they were read.
        config: `config.json`.
        tensors: by name in the checkpoint; empty where the weights aren't safetensors.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def model_type(self) -> str | None:
        value = self.config.get("model_type")
        return value if isinstance(value, str) else None

    @property
    def language_config(self) -> dict[str, Any]:
        """The part of the config that is about text, where a model also sees or hears."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @cached_property
    def _paths(self) -> set[str]:
        """Every module's path in the checkpoint, that of lists and blocks included."""
        parts = [name.split(".") for name in self.tensors]
        return {".".join(path[:stop]) for path in parts for stop in range(1, len(path))}

    def contains(self, module: str) -> bool:
        """Whether the base has a module of that path in the model."""
        return any(path in self._paths for path in _without_outermost(module))

    def find(self, name: str) -> TensorInfo | None:
        """A tensor by its name in the model."""
        candidates = _without_outermost(name)
        tied = self.tensors.get("model.embed_tokens.weight") if self.config.get("tie_word_embeddings") else None
        found = next((self.tensors[item] for item in candidates if item in self.tensors), None)
        return found or (tied if name == "lm_head.weight" else None)

    def shapes(self, module: str) -> list[SiteShape]:
        """What a module may be, judged by its weight: a matrix is a linear layer or an embedding. [] if unknown."""
        packed = self.find(f"{module}.in_proj_weight")
        weight = packed or self.find(f"{module}.weight")
        if weight is None or weight.dtype not in FLOATS or weight.numel == 0 or not weight.shape:
            return []
        bias = self.find(f"{module}.bias") is not None
        if len(weight.shape) == 1:
            return [SiteShape(module, "module", weight.numel, weight.numel, has_bias=bias)]
        out_features, in_features, *kernel = weight.shape
        if packed:
            return [SiteShape(module, "attention", in_features, out_features, has_bias=bias)]
        if kernel:
            return [SiteShape(module, "conv", in_features, out_features, tuple(kernel), has_bias=bias)]
        embedding = SiteShape(module, "embedding", out_features, in_features)
        is_embedding = module.rpartition(".")[2] in EMBEDDINGS  # to be tried first: both may explain an adapter
        if self.model_type in STORED_TRANSPOSED and not module.endswith("lm_head"):
            out_features, in_features = in_features, out_features
        linear = SiteShape(module, "linear", in_features, out_features, has_bias=bias)
        return [embedding, linear] if is_embedding else [linear, embedding]

    def modules(self) -> list[str]:
        """Modules with a weight, in the file's order."""
        return [name.removesuffix(".weight") for name in self.tensors if name.endswith(".weight")]


def _without_outermost(name: str) -> Iterator[str]:
    """A name, and what a checkpoint may call it: it may leave out the outermost parts (`transformer.h.0` -> `h.0`)."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(max(1, len(parts) - 1)))


def read_base(folder: Path) -> BaseFacts:
    """Config and tensor headers of a base model's folder.

    Raises:
        InputError: if a file that is there can't be read or is not what its name says.
    """
    config = read_strict_json(folder / "config.json")
    tensors: dict[str, TensorInfo] = {}
    for name in weight_files(folder):
        tensors |= read_header(folder / name).tensors
    return BaseFacts(folder, config, tensors)


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files in a base model's folder; [] if its weights are of another kind. Raises as above."""
    if is_file(folder / WEIGHTS):
        return [WEIGHTS]
    if not is_file(folder / INDEX):
        return []
    index = read_strict_json(folder / INDEX, limit=MAX_INDEX_BYTES)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InputError("maps something else than tensors to files", place=folder / INDEX, field="weight_map")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name or name.startswith("."):
            raise InputError(f"{printable(name)!r} is no plain file name", place=folder / INDEX, field="weight_map")
    return names
