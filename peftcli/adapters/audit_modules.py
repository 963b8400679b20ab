"""The tensors an adapter keeps at the modules it adapts: are they all there, and of the right shape?"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from peftcli.adapters.audit_targets import check_parameters, check_replication, not_meant, unmet
from peftcli.adapters.base import Adapter, TensorSpec
from peftcli.adapters.base_facts import BaseFacts
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.findings import Findings
from peftcli.adapters.fit import ANY, Fit, Fitter, Found, agrees, probes, shown
from peftcli.adapters.fused_parameters import fused_parameter
from peftcli.adapters.header import TensorFile, TensorInfo
from peftcli.adapters.keys import PREFIX, Key, KeyReader, ascii_name, base_path, numbered_zero
from peftcli.adapters.registry import adapter_class, adapter_class_of
from peftcli.adapters.targets import DUMMY_TARGET_MODULES
from peftcli.errors import InputError

NAMES_LOOK_LIKE = f"names look like `{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight`"


@dataclass
class Part:
    """One method's tensors in an adapter file: the config's own, or a companion's (trainable tokens beside LoRA).

    Attributes:
        config: the method's config.
        modules: its tensors at each adapted module, by the module's path in the file.
        shared: its tensors kept once a model.
        fits: what was made out of each module, by path; filled by `check_modules`.
    """

    config: TunerConfig
    modules: dict[str, Found] = field(default_factory=dict)
    shared: Found = field(default_factory=dict)
    fits: dict[str, Fit] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """An adapter file's tensors, sorted by what their names say.

    Attributes:
        parts: each method's; the config's own first.
        others: all else.
    """

    parts: list[Part] = field(default_factory=list)
    others: list[tuple[Key, TensorInfo]] = field(default_factory=list)


def sort_out(file: TensorFile, config: TunerConfig, findings: Findings) -> Contents:
    """Sort a file's tensors by their names; names that are not as they should be are reported.

    Raises:
        InputError: if the config holds something the method can't work with.
    """
    contents = Contents([Part(config), *(Part(companion) for companion in config.companions())])
    owners = {name: part for part in contents.parts[::-1] for name in _parameter_names(part.config)}
    obsolete = adapter_class(config).obsolete
    reader = KeyReader(owners)
    for tensor in file.tensors.values():
        key = reader.read(tensor.name)
        for fault in key.faults:
            findings.error(fault, ascii_name(tensor.name), fix=NAMES_LOOK_LIKE)
        if key.module and key.parameter in obsolete:
            continue
        if not key.is_method:
            contents.others.append((key, tensor))
            continue
        part = owners.get(key.parameter) or owners[numbered_zero(key.parameter)]
        found = part.modules.setdefault(key.module, {}) if key.module else part.shared
        if key.parameter in found:
            findings.error("stands for the same tensor as another name in the file", ascii_name(tensor.name))
        found[key.parameter] = tensor
    return contents


def _parameter_names(config: TunerConfig) -> set[str]:
    """Every name the method may give a tensor, at whatever kind of module."""
    cls = adapter_class(config)
    names: set[str] = set()
    problem: InputError | None = None
    for shape in probes(cls, "0"):
        try:
            adapter = cls(config, shape)
            names |= adapter.file_tensors().keys() | {key for key, spec in adapter.tensors().items() if spec.shared}
        except InputError as error:  # a block size that does not divide the probe
            problem = error
    if problem and not names:
        raise problem
    return names


def check_modules(part: Part, base: BaseFacts | None, findings: Findings, *, is_companion: bool) -> None:
    """Check the tensors at each module against what the method states; fills `part.fits`.

    Raises:
        InputError: if an expression of the config is broken or takes too long.
    """
    config = part.config
    cls = adapter_class(config)
    fitter = Fitter(cls, config)
    for path, found in part.modules.items():
        site = base_path(path)
        fused = fused_parameter(config, path, part.modules)
        tied = cls.follows_ties and len(part.modules) > 1  # PEFT stores the tensors once more for a tied head
        cause = None if fused or tied else not_meant(config, site, base)
        if fused:
            option = Fitter(adapter_class_of(config.parameter_method(fused.experts)), config).fit(site, found, [fused])
        else:
            option = fitter.fit(site, found, base.shapes(site) if base else [])
        part.fits[path] = option
        if cause:
            for tensor in found.values():
                findings.error(cause, ascii_name(tensor.name))
        else:
            _check_tensors(option, path, found, findings)
    sites = {base_path(path) for path in part.modules}
    stored_once = bool(part.shared) and _stores_once(config)
    if not sites and not stored_once and not _adapts_nothing(config):
        what = getattr(config, "field", config.peft_type) if is_companion else config.peft_type
        findings.error(f"the config asks for {what}, but the file has no such tensors")
    elif base is not None and base.tensors and not stored_once and not _renames_modules(config):
        unmet(config, cls, sites, base, findings)
    check_replication(config, sites, base, findings)
    check_parameters(config, sites, findings)
    _check_shared(part, findings)


def _adapts_nothing(config: TunerConfig) -> bool:
    """Whether the adapter is meant to hold `modules_to_save` alone (PEFT's word for it)."""
    targets = config.target_modules or []
    return DUMMY_TARGET_MODULES in ([targets] if isinstance(targets, str) else targets)


def _stores_once(config: TunerConfig) -> bool:
    """Whether the method stores nothing at the modules it adapts, only what the model has once (Uni-LoRA)."""
    cls = adapter_class(config)
    shape = next(probes(cls, "probe"), None)
    with suppress(InputError):  # a block size that does not divide the probe
        return shape is not None and not cls(config, shape).file_tensors()
    return False


def _renames_modules(config: TunerConfig) -> bool:
    """Whether modules of the adapted model are called otherwise than in the base's checkpoint."""
    return bool(getattr(config, "target_parameters", None) or getattr(config, "layer_replication", None))


def _check_tensors(option: Fit, path: str, found: Found, findings: Findings) -> None:
    for name in option.specs.keys() - found.keys():
        findings.error(f"`{name}` is missing", f"{PREFIX}{path}.{name}")
    for name, tensor in found.items():
        spec = option.specs.get(name)
        if spec is None:
            findings.error("does not belong beside the module's other tensors", ascii_name(tensor.name))
        elif not agrees(spec, tensor):
            findings.error(_wrong_shape(option.adapter, name, spec, tensor), ascii_name(tensor.name))


def _wrong_shape(adapter: Adapter, name: str, spec: TensorSpec, tensor: TensorInfo) -> str:
    """What is wrong with a shape, in the words of the config where it is the rank."""
    rank = getattr(adapter, "r", None)
    text = f"is {list(tensor.shape)}, not {shown(spec.shape)}"
    if len(spec.shape) == len(tensor.shape):
        wrong = [(have, want) for have, want in zip(tensor.shape, spec.shape, strict=True) if want not in (ANY, have)]
        if rank is not None and all(want == rank for _, want in wrong):
            return f"{text}: r is {rank} in the config, {wrong[0][0]} in {name}"
        if tensor.shape == spec.shape[::-1]:
            return f"{text}: stored transposed"
    return text


def _check_shared(part: Part, findings: Findings) -> None:
    """Tensors kept once a model: present if a module's method says they are saved."""
    expected = {
        name
        for option in part.fits.values()
        for name, spec in option.adapter.tensors().items()
        if spec.shared and spec.saved
    }
    for name in expected - part.shared.keys():
        findings.error("is missing", f"base_model.{name}")
