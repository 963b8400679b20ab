"""Which module an adapter's tensors belong to, worked out from what its method would keep there.

A method states its tensors for a module of given size (`Adapter.tensors`). With the base at hand the size is known. From
an adapter alone it is solved for: the statement is asked at growing sizes, which shows the dimensions that grow with the
module's input or output, and the file's tensors give the rest. No method is treated specially.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from peftcli.adapters.base import Adapter, SiteKind, SiteShape, TensorSpec
from peftcli.adapters.config import PeftConfig
from peftcli.adapters.header import TensorInfo
from peftcli.errors import InputError

KINDS: tuple[SiteKind, ...] = ("linear", "embedding", "conv", "module")
PROBES = ((1 << 20, 1 << 22), (4, 4))
"""Sizes (in, out) to ask a method at: divisible by every usual block size, and smaller than most ranks (LoKr's tensors
depend on that)."""

ANY = -1
"""A dimension that depends on a size nobody knows."""

Side = Literal["in_features", "out_features"]
SIDES: tuple[Side, Side] = ("in_features", "out_features")

Found = dict[str, TensorInfo]
"""An adapter's tensors at one module, by the key's last part (`lora_A.weight`)."""

Specs = dict[str, TensorSpec]


@dataclass(frozen=True)
class Fit:
    """What a method says about one module's tensors.

    Attributes:
        shape: the module; sizes are 0 where they could not be found out.
        adapter: the method at that module (its rank, scaling and the like).
        specs: the tensors it should have in the file; dimensions may be `ANY`.
    """

    shape: SiteShape
    adapter: Adapter
    specs: Specs


def agrees(spec: TensorSpec, tensor: TensorInfo) -> bool:
    """Whether a tensor has the shape that is meant."""
    return len(spec.shape) == len(tensor.shape) and all(
        want in (ANY, have) for want, have in zip(spec.shape, tensor.shape, strict=True)
    )


def shown(shape: tuple[int, ...]) -> str:
    """A spec's shape in words, `[4, any]`."""
    return f"[{', '.join('any' if size == ANY else str(size) for size in shape)}]"


def probes(cls: type[Adapter], module: str, kernel: tuple[int, ...] = ()) -> Iterator[SiteShape]:
    """Modules to ask a method at, of every kind it knows."""
    for kind in KINDS:
        for in_features, out_features in PROBES if kind in cls.kinds else ():
            for has_bias in (False, True) if kind in ("linear", "module") else (False,):
                yield SiteShape(
                    module, kind, in_features, out_features, kernel if kind == "conv" else (), has_bias=has_bias
                )


class Fitter:
    """Explains the tensors of one method, module by module. Modules that are alike are solved for once.

    Args:
        cls, config: the method.
    """

    def __init__(self, cls: type[Adapter], config: PeftConfig) -> None:
        self.cls, self.config = cls, config
        self._solved: dict[tuple[object, ...], Fit] = {}

    def fit(self, module: str, found: Found, candidates: list[SiteShape]) -> Fit:
        """The best explanation of a module's tensors.

        Args:
            module: the module's path.
            found: its tensors in the file.
            candidates: what the base says the module may be; [] where the base is not at hand.

        Raises:
            InputError: if the method can't be applied to such a module at all.
        """
        known = [shape for shape in candidates if shape.kind in self.cls.kinds]
        if known:
            return min((self._at(shape) for shape in known), key=lambda option: _distance(option, found))
        kernel = next((tensor.shape[2:] for tensor in found.values() if len(tensor.shape) > 2), ())
        shapes = list(probes(self.cls, module, kernel))
        alike = self._alike(shapes, found)
        if alike not in self._solved:
            self._solved[alike] = min(self._options(shapes, found), key=lambda option: _distance(option, found))
        option = self._solved[alike]
        adapter = self.cls(self.config, replace(option.adapter.shape, name=module))
        return Fit(replace(option.shape, name=module), adapter, option.specs)

    def _alike(self, shapes: list[SiteShape], found: Found) -> tuple[object, ...]:
        """What decides the answer: the tensors' shapes, and what the method says of this module at some size."""
        stated: list[object] = []
        for shape in shapes[:1]:
            with suppress(InputError):
                stated += [(name, spec.shape) for name, spec in self._at(shape).specs.items()]
        return *stated, *sorted((name, tensor.shape) for name, tensor in found.items())

    def _at(self, shape: SiteShape) -> Fit:
        adapter = self.cls(self.config, shape)
        return Fit(shape, adapter, adapter.file_tensors())

    def _options(self, shapes: list[SiteShape], found: Found) -> list[Fit]:
        """A fit for each probe, its sizes taken from the tensors; a perfect one alone."""
        fits = []
        problem: InputError | None = None
        for probe in shapes:
            try:
                option = self._solve(probe, found)
            except InputError as error:  # a block size that does not divide the probe
                problem = error
                continue
            if 0 not in (option.shape.in_features, option.shape.out_features) and _distance(option, found) == (0, 0):
                return [option]
            fits.append(option)
        if not fits:
            raise problem or InputError(f"{self.config.peft_type} adapts none of {', '.join(KINDS)}")
        return fits

    def _solve(self, probe: SiteShape, found: Found) -> Fit:
        """The fit at the sizes that the tensors give."""
        base = self._at(probe)
        sizes = {side: _size(getattr(probe, side), base.specs, self._grown(probe, side), found) for side in SIDES}
        sized = replace(
            probe,
            in_features=sizes["in_features"] or probe.in_features,
            out_features=sizes["out_features"] or probe.out_features,
        )
        option = self._at(sized)
        for side in SIDES:
            if sizes[side] == 0:
                option = replace(option, specs=_masked(option.specs, self._grown(sized, side)))
        shape = replace(sized, in_features=sizes["in_features"] or 0, out_features=sizes["out_features"] or 0)
        return replace(option, shape=shape)

    def _grown(self, shape: SiteShape, side: Side) -> list[Specs]:
        """The specs where one side is twice and four times as large."""
        return [self._at(_scaled(shape, side, times)).specs for times in (2, 4)]


def _scaled(shape: SiteShape, side: Side, times: int) -> SiteShape:
    if side == "in_features":
        return replace(shape, in_features=shape.in_features * times)
    return replace(shape, out_features=shape.out_features * times)


def _size(probe: int, specs: Specs, grown: list[Specs], found: Found) -> int | None:
    """The size that explains the first dimension which doubles when the probe does, twice over.

    Returns:
        None if no tensor depends on the size, 0 if some do but none tells.
    """
    if all(step == specs for step in grown):
        return None
    for name, spec in specs.items():
        actual = found[name].shape if name in found and found[name].numel else ()  # an empty one proves no size
        if len(actual) != len(spec.shape) or not all(name in step for step in grown):
            continue
        for axis, now in enumerate(spec.shape):
            then = [step[name].shape[axis] for step in grown]
            if then == [2 * now, 4 * now] and actual[axis] * probe % now == 0:
                return actual[axis] * probe // now
    return 0


def _masked(specs: Specs, grown: list[Specs]) -> Specs:
    """Specs with `ANY` for each dimension that changes with the size."""
    masked = {}
    for name, spec in specs.items():
        shapes = [step[name].shape for step in grown if name in step] or [()]
        same = [all(shape[axis : axis + 1] == (size,) for shape in shapes) for axis, size in enumerate(spec.shape)]
        shape = tuple(size if is_same else ANY for size, is_same in zip(spec.shape, same, strict=True))
        masked[name] = replace(spec, shape=shape)
    return masked


def _distance(option: Fit, found: Found) -> tuple[int, int]:
    """How badly an option explains the tensors: names first, then dimensions."""
    names = len(option.specs.keys() ^ found.keys())
    return names, sum(not agrees(spec, found[name]) for name, spec in option.specs.items() if name in found)
