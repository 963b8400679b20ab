"""Does an adapter file hold tensors for the modules its config means, for all of them and for no other?"""

from __future__ import annotations

from collections.abc import Iterator

from peftcli.adapters.base import Adapter
from peftcli.adapters.base_facts import BaseFacts
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.findings import Findings
from peftcli.adapters.keys import PREFIX, ascii_name
from peftcli.adapters.targets import default_targets, is_all_linear, layer_index, matches
from peftcli.errors import InputError, printable


def not_meant(config: TunerConfig, site: str, base: BaseFacts | None) -> str | None:
    """Why the config does not mean a module that has tensors, or None if it does.

    Raises:
        InputError: if an expression of the config is broken or takes too long.
    """
    targets = config.target_modules
    if targets is None and base is not None and config.default_tables.get("target_modules") == "targets":
        targets = default_targets(config.peft_type, base.model_type)
    if targets is not None and not is_all_linear(targets) and not matches(targets, site, field="target_modules"):
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


def unmet(config: TunerConfig, cls: type[Adapter], sites: set[str], base: BaseFacts, findings: Findings) -> None:
    """Report modules of the base that the config means and the file says nothing about, and the other way round.

    Args:
        config, cls: the method.
        sites: modules with tensors in the file.
        base: the base model.
        findings: takes the reports.
    """
    strangers = sorted(site for site in sites if not base.contains(site))
    for site in strangers:
        findings.doubt(f"is no module of the base {printable(base.folder.name)}", ascii_name(site))
    if strangers:  # the model names its modules otherwise than its checkpoint: nothing can be missed
        return
    leaves = {site.rpartition(".")[2] for site in sites}
    weights = (base.find(f"{site}.weight") for site in sites)
    present = {weight.name.removesuffix(".weight") for weight in weights if weight}
    for module in _meant(config, cls, base):
        if module not in present and module.rpartition(".")[2] in leaves:
            findings.error("is meant by the config, but has no tensors in the file", f"{PREFIX}{module}")


def _meant(config: TunerConfig, cls: type[Adapter], base: BaseFacts) -> Iterator[str]:
    for module in base.modules():
        try:
            is_kind = any(shape.kind in cls.kinds for shape in base.shapes(module))
            if is_kind and not_meant(config, module, base) is None:
                yield module
        except InputError:  # an expression that takes too long on this name; the adapter's own were checked
            return


def check_replication(config: TunerConfig, sites: set[str], base: BaseFacts | None, findings: Findings) -> None:
    """A model deepened by `layer_replication` has an adapter for each of its layers, the repeated ones included."""
    ranges = getattr(config, "layer_replication", None) or []
    known = base.language_config.get("num_hidden_layers") if base else None
    for start, end in ranges:
        if start >= end or (type(known) is int and end > known):
            findings.error(f"`layer_replication` names the layers {start} to {end}, which the base cannot have")
            return
    depth = sum(end - start for start, end in ranges)
    layers = {index for index in map(layer_index, sites) if index is not None}
    whole = len(layers) == depth and max(layers, default=-1) == depth - 1
    partly = config.layers_to_transform is not None and len(layers) < depth
    if ranges and not whole and not partly:
        findings.error(f"`layer_replication` builds {depth:,} layers, but {len(layers):,} have tensors in the file")


def check_parameters(config: TunerConfig, sites: set[str], findings: Findings) -> None:
    """Each entry of `target_parameters` has tensors at the module that holds the parameter."""
    for entry in getattr(config, "target_parameters", None) or []:
        owner = entry.rpartition(".")[0]
        if not any(f".{site}".endswith(f".{owner}") for site in sites):
            findings.error("is in `target_parameters`, but has no tensors in the file", ascii_name(entry))
