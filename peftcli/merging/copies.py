"""What adapters train in full (heads, embeddings, biases), merged as differences from the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.errors import InputError, InputErrors, printable
from peftcli.merging.base_weights import BaseWeights
from peftcli.merging.operators import OPERATORS, Settings
from peftcli.merging.source import Source

if TYPE_CHECKING:
    from numpy.typing import NDArray


def check_full_weights(sources: Sequence[Source], base: BaseWeights | None) -> None:
    """Refuse by name what is trained in full and can't be merged.

    Raises:
        InputErrors: modules trained in full or trainable tokens without a base; modules that the base does not have; biases
            that not all adapters train.
    """
    problems = []
    biases = {frozenset(name for name in source.copies if _is_bias(source, name)) for source in sources}
    for source in sources:
        for name in source.copies:
            found = base.find(name) if base else None
            if base is None:
                problems.append(_refusal(source, name, "is trained in full", "name the base: --base FOLDER"))
            elif found is None:
                problems.append(_refusal(source, name, "is trained in full, and the base has no such tensor", None))
            elif found.shape != source.copies[name].shape:
                problems.append(_refusal(source, name, "has another shape than in the base", None))
        if len(biases) > 1 and any(_is_bias(source, name) for name in source.copies):
            problems.append(_refusal(source, "bias", "is trained here and not in every other adapter", None))
        if base is None:
            for part in source.companions:
                module = next(iter(part.modules))
                problems.append(_refusal(source, module, "has trainable tokens", "name the base: --base FOLDER"))
    if problems:
        raise InputErrors(problems)


def merged_copy(
    name: str, sources: Sequence[Source], weights: Sequence[float], kind: str, settings: Settings, base: BaseWeights
) -> NDArray[Any]:
    """base + the operator over (copy - base), float32. Adapters that leave the tensor alone change nothing.

    Args:
        name: the tensor's name in the base.
        kind: an operator's name.
        settings: densities of all sources.
    """
    original = base.array(name)
    here = [index for index, source in enumerate(sources) if name in source.copies]
    changes = [sources[index].array(sources[index].copies[name]) - original for index in here]
    density = [settings.density[index] for index in here] if settings.density else ()
    chosen = Settings(density, settings.majority_sign_method, settings.generator)
    return original + OPERATORS[kind](changes, [weights[index] for index in here], chosen)


def copy_fields(sources: Sequence[Source]) -> dict[str, Any]:
    """The config fields of the result that speak of what is trained in full."""
    fields: dict[str, Any] = {}
    saved = sorted({name for source in sources for name in getattr(source.config, "modules_to_save", None) or []})
    if any(source.copies for source in sources) and saved:
        fields["modules_to_save"] = saved
    kinds = {source.config.bias for source in sources if any(_is_bias(source, name) for name in source.copies)}
    if kinds:
        fields["bias"] = "all" if "all" in kinds else "lora_only"
    return fields


def _is_bias(source: Source, name: str) -> bool:
    trained = getattr(source.config, "bias", "none") != "none"
    saved = getattr(source.config, "modules_to_save", None) or []
    return trained and name.endswith("bias") and not any(f"{entry}." in name for entry in saved)


def _refusal(source: Source, name: str, problem: str, fix: str | None) -> InputError:
    place: str | Path = source.folder
    return InputError(f"{printable(name)} {problem}", place=place, fix=fix)
