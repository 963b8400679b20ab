"""Trainable tokens, merged as differences from the base's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftcli.adapters.keys import PREFIX, base_path
from peftcli.lazy import numpy
from peftcli.merging.base_weights import BaseWeights
from peftcli.merging.operators import OPERATORS, Settings
from peftcli.merging.source import Source

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEY = "token_adapter.trainable_tokens_delta"


def token_modules(sources: Sequence[Source]) -> dict[str, list[int]]:
    """The tokens any adapter trains, rising, for each embedding. A tied head that repeats them is left out."""
    found: dict[str, set[int]] = {}
    for source in sources:
        for part in source.companions:
            module = base_path(next(iter(part.modules)))
            found.setdefault(module, set()).update(_indices(part))
    return {module: sorted(indices) for module, indices in found.items()}


def merged_rows(
    module: str,
    tokens: Sequence[int],
    sources: Sequence[Source],
    weights: Sequence[float],
    kind: str,
    settings: Settings,
    base: BaseWeights,
) -> tuple[str, NDArray[Any]]:
    """The key in the file and the merged rows [tokens, size], float32.

    Args:
        module: the embedding.
        tokens: of `token_modules`.
        kind: an operator's name.
        settings: densities of all sources.
    """
    original = base.array(f"{module}.weight")[numpy.array(tokens)]
    place = {token: row for row, token in enumerate(tokens)}
    changes, here, density = [], [], []
    for index, source in enumerate(sources):
        for part in source.companions:
            path = next(iter(part.modules))
            if base_path(path) == module:
                rows = numpy.array([place[token] for token in _indices(part)])
                change = numpy.zeros_like(original)
                change[rows] = source.array(part.modules[path][KEY]) - original[rows]
                changes.append(change)
                here.append(index)
                if settings.density:  # of its own rows: those of other adapters' tokens are zero here
                    own = len(rows) / len(tokens) if kind in ("ties", "magnitude_prune") else 1.0
                    density.append(settings.density[index] * own)
    chosen = Settings(density, settings.majority_sign_method, settings.generator)
    merged = original + OPERATORS[kind](changes, [weights[index] for index in here], chosen)
    return f"{PREFIX}{module}.{KEY}", merged


def token_fields(sources: Sequence[Source]) -> dict[str, Any]:
    """The config field of the result: a list where all adapters had one, else tokens by module."""
    modules = token_modules(sources)
    if not modules:
        return {}
    given = [getattr(source.config, "trainable_token_indices", None) for source in sources]
    plain = len(modules) == 1 and not any(isinstance(item, dict) for item in given)
    return {"trainable_token_indices": next(iter(modules.values())) if plain else modules}


def _indices(part: Any) -> list[int]:
    indices: list[int] = part.config.token_indices
    return indices
