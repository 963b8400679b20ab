"""IA3 with IA3: scales merged as differences from 1, or, in factor space, as PEFT does, from 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peftcli.adapters.keys import PREFIX
from peftcli.errors import InputError
from peftcli.merging.lora_file import target_modules
from peftcli.merging.operators import OPERATORS, Settings
from peftcli.merging.source import Source

if TYPE_CHECKING:
    from numpy.typing import NDArray


def check_scales(sources: Sequence[Source], kind: str) -> None:
    """Refuse what scales can't do: ranks, and a module scaled at its inputs by one adapter and at its outputs by another."""
    if kind not in OPERATORS:
        raise InputError(f"{kind} needs ranks, and IA3 has none", field="--method", allowed=", ".join(OPERATORS))
    shapes: dict[str, tuple[int, ...]] = {}
    for source in sources:
        assert source.part is not None
        for module, path in source.paths.items():
            shape = source.part.modules[path]["ia3_l"].shape
            if shapes.setdefault(module, shape) != shape:
                raise InputError(
                    f"scales {module} with {list(shape)}, another adapter with {list(shapes[module])}",
                    place=source.folder,
                )


def merged_scale(
    module: str, sources: Sequence[Source], weights: Sequence[float], kind: str, settings: Settings, *, centre: float
) -> tuple[str, NDArray[Any]]:
    """The key in the file and the merged scale of one module. Where an adapter is absent its scale is 1.

    Args:
        centre: what scales are measured from.
    """
    scales, chosen, density = [], [], []
    for index, source in enumerate(sources):
        if module in source.paths:
            assert source.part is not None
            held = source.part.modules[source.paths[module]]
            scales.append(source.array(held["ia3_l"]) - centre)
            chosen.append(weights[index])
            density += [settings.density[index]] if settings.density else []
    merged = OPERATORS[kind](scales, chosen, Settings(density, settings.majority_sign_method, settings.generator))
    return f"{PREFIX}{module}.ia3_l", (merged + centre).astype("f4")


def scale_config(sources: Sequence[Source], modules: Sequence[str]) -> Any:
    """The config of the result."""
    configs = [source.config for source in sources]
    feedforward = sorted(
        {
            module
            for source in sources
            for module in source.paths
            if getattr(source.adapter(module), "is_feedforward", False)
        }
    )
    names = target_modules(configs, modules)
    return replace(
        configs[0],
        target_modules=sorted({*names, *feedforward}),
        feedforward_modules=feedforward or None,
        layers_to_transform=None,
        exclude_modules=None,
        inference_mode=True,
    )
