"""Which module an adapter's tensors belong to, worked out from what its method would keep there.

A method states its tensors for a module of given size (`Adapter.tensors`). With the base at hand the size is known. From
an adapter alone it is solved for: the statement is asked at three sizes, which shows the dimensions that grow with the
module's input or output, and the file's tensors give the rest. No method is treated specially.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftcli.adapters.base import Adapter, SiteKind, SiteShape, TensorSpec
from peftcli.adapters.config import PeftConfig
from peftcli.adapters.header import TensorInfo
from peftcli.errors import InputError

PROBES = ((1 << 20, 1 << 22), (4, 4))
"""Sizes (in, out) to ask a method at: divisible by every usual block size, and smaller than most ranks (LoKr's tensors
depend on that)."""

KINDS: tuple[SiteKind, ...] = ("linear", "embedding", "conv")

Found = dict[str, TensorInfo]
"""An adapter's tensors at one module, by the key's last part (`lora_A.weight`)."""


@dataclass(frozen=True)
class Fit:
    """What a method says about one module's tensors.

    Attributes:
        shape: the module; sizes are 0 where they could not be found out.
        adapter: the method at that module (its rank, scaling and the like).
        specs: the tensors it should have in the file.
        exact: whether the module's size is known, so that the specs' shapes are meant exactly.
    """

    shape: SiteShape
    adapter: Adapter
    specs: dict[str, TensorSpec]
    exact: bool


def saved_specs(adapter: Adapter) -> dict[str, TensorSpec]:
    """The tensors of one module that a file holds under the module's own name."""
    return {name: spec for name, spec in adapter.tensors().items() if spec.saved and not spec.shared}


def fit(cls: type[Adapter], config: PeftConfig, module: str, found: Found, candidates: list[SiteShape]) -> Fit:
    """The best explanation of a module's tensors.

    Args:
        cls, config: the method.
        module: the module's path.
        found: its tensors in the file.
        candidates: what the base says the module may be; [] where the base is not at hand.

    Raises:
        InputError: if the method can't be applied to such a module at all.
    """
    known = [shape for shape in candidates if shape.kind in cls.kinds]
    options = [_at(cls, config, shape, exact=True) for shape in known] or _solved(cls, config, module, found)
    return min(options, key=lambda option: _distance(option, found))


def _at(cls: type[Adapter], config: PeftConfig, shape: SiteShape, *, exact: bool) -> Fit:
    adapter = cls(config, shape)
    return Fit(shape, adapter, saved_specs(adapter), exact)


def _solved(cls: type[Adapter], config: PeftConfig, module: str, found: Found) -> list[Fit]:
    """A fit for each kind of module and probe, its sizes taken from the tensors."""
    fits = []
    problem: InputError | None = None
    kernel = next((tensor.shape[2:] for tensor in found.values() if len(tensor.shape) > 2), ())
    for kind in KINDS:
        for in_features, out_features in PROBES:
            shape = SiteShape(module, kind, in_features, out_features, kernel if kind == "conv" else ())
            if kind in cls.kinds:
                try:
                    fits.append(_solve(cls, config, shape, found))
                except InputError as error:  # a block size that does not divide the probe
                    problem = error
    if not fits:
        raise problem or InputError(f"{config.peft_type} adapts none of {', '.join(KINDS)}")
    return fits


def _solve(cls: type[Adapter], config: PeftConfig, probe: SiteShape, found: Found) -> Fit:
    """The fit at the size that the tensors give. A side that no tensor depends on is 0 in its shape."""
    base = _at(cls, config, probe, exact=False)
    wider = [saved_specs(cls(config, replace(probe, in_features=n * probe.in_features))) for n in (2, 4)]
    taller = [saved_specs(cls(config, replace(probe, out_features=n * probe.out_features))) for n in (2, 4)]
    in_features = _size(probe.in_features, [base.specs, *wider], found)
    out_features = _size(probe.out_features, [base.specs, *taller], found)
    shape = replace(probe, in_features=in_features or 0, out_features=out_features or 0)
    if 0 in (in_features, out_features):
        return replace(base, shape=shape)
    sized = replace(
        probe,
        in_features=in_features or probe.in_features,
        out_features=out_features or probe.out_features,
    )
    return replace(_at(cls, config, sized, exact=True), shape=shape)


def _size(probe: int, steps: list[dict[str, TensorSpec]], found: Found) -> int | None:
    """The size that explains the first dimension which doubles when the probe does, twice over.

    Returns:
        None if no tensor depends on the size, 0 if some do but none tells.
    """
    if all(specs == steps[0] for specs in steps):
        return None
    for name, spec in steps[0].items():
        actual = found[name].shape if name in found else ()
        if len(actual) != len(spec.shape) or not all(name in specs for specs in steps):
            continue
        for axis, now in enumerate(spec.shape):
            grown = [specs[name].shape[axis] for specs in steps[1:]]
            if grown == [2 * now, 4 * now] and actual[axis] * probe % now == 0:
                return actual[axis] * probe // now
    return 0


def _distance(option: Fit, found: Found) -> tuple[int, int]:
    """How badly an option explains the tensors: names first, then dimensions."""
    names = len(option.specs.keys() ^ found.keys())
    shapes = sum(
        len(spec.shape) != len(found[name].shape) or (option.exact and spec.shape != found[name].shape)
        for name, spec in option.specs.items()
        if name in found
    )
    return names, shapes
