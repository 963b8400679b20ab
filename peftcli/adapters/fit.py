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

PROBE_IN, PROBE_OUT = 1 << 20, 1 << 22  # divisible by every usual block size, larger than any rank
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
    """One fit for each kind of module, its sizes taken from the tensors."""
    fits = []
    for kind in KINDS:
        if kind in cls.kinds:
            kernel = next((tensor.shape[2:] for tensor in found.values() if len(tensor.shape) > 2), ())
            probe = SiteShape(module, kind, PROBE_IN, PROBE_OUT, kernel if kind == "conv" else ())
            fits.append(_solve(cls, config, probe, found))
    if not fits:
        raise InputError(f"{config.peft_type} adapts none of {', '.join(KINDS)}")
    return fits


def _solve(cls: type[Adapter], config: PeftConfig, probe: SiteShape, found: Found) -> Fit:
    base = _at(cls, config, probe, exact=False)
    wider = saved_specs(cls(config, replace(probe, in_features=2 * PROBE_IN)))
    taller = saved_specs(cls(config, replace(probe, out_features=2 * PROBE_OUT)))
    in_features = _size(base.specs, wider, found, PROBE_IN)
    out_features = _size(base.specs, taller, found, PROBE_OUT)
    if in_features == 0 or out_features == 0:
        shape = replace(probe, in_features=in_features, out_features=out_features)
        return replace(base, shape=shape)
    return _at(cls, config, replace(probe, in_features=in_features, out_features=out_features), exact=True)


def _size(specs: dict[str, TensorSpec], grown: dict[str, TensorSpec], found: Found, probe: int) -> int:
    """The size that explains the first dimension which doubled when the probe did; 0 if none tells."""
    for name, spec in specs.items():
        actual = found[name].shape if name in found else ()
        if len(actual) != len(spec.shape):
            continue
        for now, then, size in zip(spec.shape, grown[name].shape, actual, strict=True):
            if then == 2 * now and size * probe % now == 0:
                return size * probe // now
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
