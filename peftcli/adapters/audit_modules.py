"""The tensors an adapter keeps at the modules it adapts: are they all there, and of the right shape?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from peftcli.adapters.base import Adapter, TensorSpec
from peftcli.adapters.base_facts import BaseFacts
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.findings import Findings
from peftcli.adapters.fit import ANY, Fit, Found, agrees, fit, probes
from peftcli.adapters.header import TensorFile, TensorInfo
from peftcli.adapters.keys import PREFIX, Key, base_path, take_apart
from peftcli.adapters.registry import adapter_class
from peftcli.adapters.targets import default_targets, layer_index, matches
from peftcli.errors import InputError, printable

NAMES_LOOK_LIKE = f"names look like `{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight`"


@dataclass(frozen=True)
class Contents:
    """An adapter file's tensors, sorted by what their names say.

    Attributes:
        modules: the method's tensors at each adapted module, by its path.
        shared: the method's tensors kept once a model.
        others: all else.
    """

    modules: dict[str, Found]
    shared: Found
    others: list[tuple[Key, TensorInfo]]


def sort_out(file: TensorFile, config: TunerConfig, findings: Findings) -> Contents:
    """Sort a file's tensors by their names; names that are not as they should be are reported.

    Raises:
        InputError: if the config holds something the method can't work with.
    """
    parameters = _parameter_names(adapter_class(config), config)
    modules: dict[str, Found] = defaultdict(dict)
    shared: Found = {}
    others = []
    for tensor in file.tensors.values():
        key = take_apart(tensor.name, parameters)
        for fault in key.faults:
            findings.error(fault, _ascii(tensor.name), fix=NAMES_LOOK_LIKE)
        if not key.is_method:
            others.append((key, tensor))
            continue
        found = modules[key.module] if key.module else shared
        if key.parameter in found:
            findings.error("stands for the same tensor as another name in the file", _ascii(tensor.name))
        found[key.parameter] = tensor
    return Contents(dict(modules), shared, others)


def _ascii(name: str) -> str:
    """A name with look-alikes of other alphabets escaped, so that they show."""
    return name if name.isascii() else name[:2000].encode("ascii", "backslashreplace").decode()


def _parameter_names(cls: type[Adapter], config: TunerConfig) -> set[str]:
    """Every name the method may give a tensor, at whatever kind of module."""
    names: set[str] = set()
    problem: InputError | None = None
    for shape in probes(cls, "probe"):
        try:
            names |= cls(config, shape).tensors().keys()
        except InputError as error:  # a block size that does not divide the probe
            problem = error
    if problem and not names:
        raise problem
    return names


def check_modules(
    config: TunerConfig, contents: Contents, base: BaseFacts | None, findings: Findings
) -> dict[str, Fit]:
    """Check the tensors at each module against what the method states.

    Returns:
        What was made out of each module.

    Raises:
        InputError: if an expression of the config is broken or takes too long.
    """
    cls = adapter_class(config)
    fits = {}
    for path, found in contents.modules.items():
        site = base_path(path)
        candidates = base.shapes(site) if base else []
        fits[path] = option = fit(cls, config, site, found, candidates)
        cause = _not_meant(config, site, base)
        if cause:
            for tensor in found.values():
                findings.error(cause, _ascii(tensor.name))
        else:
            _check_tensors(option, path, found, findings)
    if base is not None and base.tensors:
        _check_presence(config, contents, base, findings)
    _check_shared(fits, contents.shared, findings)
    return fits


def _check_tensors(option: Fit, path: str, found: Found, findings: Findings) -> None:
    for name in option.specs.keys() - found.keys():
        findings.error(f"`{name}` is missing", f"{PREFIX}{path}.{name}")
    for name, tensor in found.items():
        spec = option.specs.get(name)
        if spec is None:
            if name not in option.adapter.obsolete:
                findings.error("does not belong beside the module's other tensors", _ascii(tensor.name))
        elif not agrees(spec, tensor):
            findings.error(_wrong_shape(option, name, spec, tensor), _ascii(tensor.name))


def _wrong_shape(option: Fit, name: str, spec: TensorSpec, tensor: TensorInfo) -> str:
    """What is wrong with a shape, in the words of the config where it is the rank."""
    rank = getattr(option.adapter, "r", None)
    text = f"is {list(tensor.shape)}, not {_shown(spec.shape)}"
    if len(spec.shape) == len(tensor.shape):
        wrong = [(have, want) for have, want in zip(tensor.shape, spec.shape, strict=True) if want not in (ANY, have)]
        if rank is not None and all(want == rank for _, want in wrong):
            return f"{text}: r is {rank} in the config, {wrong[0][0]} in {name}"
        if tensor.shape == spec.shape[::-1]:
            return f"{text}: stored transposed"
    return text


def _shown(shape: tuple[int, ...]) -> str:
    return f"[{', '.join('any' if size == ANY else str(size) for size in shape)}]"


def _check_shared(fits: dict[str, Fit], shared: Found, findings: Findings) -> None:
    """Tensors kept once a model: present if a module's method says they are saved."""
    expected = {
        name
        for option in fits.values()
        for name, spec in option.adapter.tensors().items()
        if spec.shared and spec.saved
    }
    for name in expected - shared.keys():
        findings.error("is missing", f"base_model.{name}")


# -- which modules are meant ----------------------------------------------------------------------------------------


def _not_meant(config: TunerConfig, site: str, base: BaseFacts | None) -> str | None:
    """Why the config does not mean a module that has tensors, or None if it does."""
    targets = config.target_modules
    if targets is None and base is not None:
        targets = default_targets(config.peft_type, base.model_type)
    if targets is not None and not config.is_all_linear and not matches(targets, site, field="target_modules"):
        return f"belongs to a module that `target_modules` does not name: {_listed(targets)}"
    if config.exclude_modules and matches(config.exclude_modules, site, field="exclude_modules"):
        return f"belongs to a module that `exclude_modules` takes out: {_listed(config.exclude_modules)}"
    wanted = config.layers_to_transform
    if wanted is not None:
        wanted = [wanted] if isinstance(wanted, int) else wanted
        index = layer_index(site, config.layers_pattern)
        if index not in wanted:
            return f"lies in layer {index}, but `layers_to_transform` is {printable(wanted, 100)}"
    return None


def _listed(names: set[str] | list[str] | str) -> str:
    if isinstance(names, str):
        return printable(repr(names), 200)
    shown = sorted(names)[:10]
    return printable(", ".join(shown), 200) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _check_presence(config: TunerConfig, contents: Contents, base: BaseFacts, findings: Findings) -> None:
    """Modules of the base that the config means and the file says nothing about, and the other way round."""
    sites = {base_path(path) for path in contents.modules}
    weights = {site: base.find(f"{site}.weight") or base.find(f"{site}.in_proj_weight") for site in sites}
    strangers = [site for site, weight in weights.items() if weight is None]
    for site in sorted(strangers):
        findings.doubt(f"is no module of the base {printable(base.folder.name)}", _ascii(site))
    if strangers:  # the model names its modules otherwise than its checkpoint: nothing can be missed
        return
    leaves = {site.rpartition(".")[2] for site in sites}
    present = {weight.name.removesuffix(".weight") for weight in weights.values() if weight}
    for module in _meant(config, base):
        if module not in present and module.rpartition(".")[2] in leaves:
            findings.error("is meant by the config, but has no tensors in the file", f"{PREFIX}{module}")


def _meant(config: TunerConfig, base: BaseFacts) -> Iterator[str]:
    kinds = adapter_class(config).kinds
    for module in base.modules():
        try:
            is_kind = any(shape.kind in kinds for shape in base.shapes(module))
            if is_kind and _not_meant(config, module, base) is None:
                yield module
        except InputError:  # an expression that takes too long on this name; the adapter's own were checked
            return
