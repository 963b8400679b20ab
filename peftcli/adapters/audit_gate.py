"""The tensors of X-LoRA's gate: the network its config describes? Its experts are adapters of their own."""

from __future__ import annotations

from peftcli.adapters.audit_modules import Contents
from peftcli.adapters.audit_prompt import plain_key
from peftcli.adapters.base import TensorSpec
from peftcli.adapters.findings import Findings
from peftcli.adapters.fit import ANY, agrees, shown
from peftcli.adapters.header import TensorFile
from peftcli.adapters.keys import SHARED_PREFIX
from peftcli.adapters.methods.xlora import XLora, XLoraConfig


def check_gate(config: XLoraConfig, file: TensorFile, findings: Findings) -> Contents:
    """Compare a gate's tensors with its config.

    Returns:
        The file's other tensors, to be checked as such.
    """
    network = f"{SHARED_PREFIX}{config.prefix}.layers."
    shapes = {f"{network}{name}": spec for name, spec in _specs(config).items()}
    for name, spec in shapes.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            findings.error("is missing", name)
        elif not agrees(spec, tensor):
            findings.error(f"is {list(tensor.shape)}, but the config asks for {shown(spec.shape)}", name)
    others = {name: tensor for name, tensor in file.tensors.items() if name not in shapes}
    return Contents(others=[(plain_key(name), tensor) for name, tensor in others.items()])


def _specs(config: XLoraConfig) -> dict[str, TensorSpec]:
    """The network's tensors. How many layers it weighs apart, and a hidden size left open, only the base tells."""
    specs = {}
    sizes = XLora(config, layers=1).linear_layers()
    for place, (inputs, outputs) in sizes.items():
        is_open = place == max(sizes) and config.layerwise_scalings
        rows = ANY if is_open else outputs
        specs[f"{place}.weight"] = TensorSpec((rows, inputs or ANY))
        specs[f"{place}.bias"] = TensorSpec((rows,))
    return specs
