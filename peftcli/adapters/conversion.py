"""Adapters of any method with an update as LoRA, on a model in memory (`peft export --to lora` does it with files)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters import checkpoint
from peftcli.adapters.base import DeltaAdapter
from peftcli.adapters.engine import Attached, adapters_of
from peftcli.adapters.layer import AdapterLayer, full_precision
from peftcli.errors import InputError

if TYPE_CHECKING:
    from peftcli.adapters.methods.lora import LoraConfig
    from peftcli.merging.algebra import LowRank, Rank


def supports_lora_conversion(model: nn.Module, adapter_name: str = "default") -> bool:
    """Whether all that an adapter does are updates of weights, which LoRA can hold."""
    attached = adapters_of(model)
    return adapter_name in attached.configs and _obstacle(attached, adapter_name) is None


def convert_to_lora(
    model: nn.Module, rank: int | float, adapter_name: str = "default", progressbar: bool = False
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The best LoRA of a rank for an adapter, as config and tensors; the model is left as it is.

    Args:
        model: a PeftModel, or a model an adapter was injected into.
        rank: a number, or the share of each update's energy (squared norm) to keep: every module then gets the rank it needs.
        adapter_name: which adapter.
        progressbar: accepted; there is none.

    Raises:
        InputError: if the adapter does more than change weights.
    """
    from peftcli.merging.lora_file import lora_config, lora_tensors

    attached = adapters_of(model)
    if adapter_name not in attached.configs:
        raise InputError(f"Adapter {adapter_name} not found.", allowed=", ".join(attached.configs))
    if (obstacle := _obstacle(attached, adapter_name)) is not None:
        raise InputError(f"has {obstacle}, which LoRA can't hold", field=adapter_name)
    wanted, state, ranks = _rank(rank), {}, {}
    for path, layer in attached.layers():
        if adapter_name in layer.adapters:
            factors = _factors(layer, adapter_name, wanted)
            state.update({key: torch.tensor(array) for key, array in lora_tensors(layer.site.shape, factors).items()})
            ranks[path] = factors.rank
    for path, copied in attached.copies():
        if adapter_name in copied.copies:
            state.update(
                {f"{checkpoint.PREFIX}{path}.{k}": t for k, t in copied.copies[adapter_name].state_dict().items()}
            )
    config = attached.configs[adapter_name]
    return lora_config([config], ranks, modules_to_save=getattr(config, "modules_to_save", None)), state


def save_as_lora(
    path: str | Path, model: nn.Module, rank: int | float, adapter_name: str = "default", progressbar: bool = False
) -> None:
    """Write what `convert_to_lora` gives as an adapter folder."""
    config, state = convert_to_lora(model, rank, adapter_name)
    checkpoint.write_weights(Path(path), state)
    config.save_pretrained(path)


def _rank(rank: int | float) -> Rank:
    from peftcli.merging.algebra import Rank

    if isinstance(rank, float) and 0 < rank < 1:
        return Rank(energy=rank)
    if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
        return Rank(number=rank)
    raise InputError(f"is {rank!r}", field="rank", allowed="a number from 1, or a share between 0.0 and 1.0")


def _factors(layer: AdapterLayer, name: str, rank: Rank) -> LowRank:
    """What the adapter adds to the module's weight [out, in], cut to a rank."""
    import numpy

    from peftcli.merging.algebra import Dense, compress

    adapter = layer.adapters[name]
    with torch.no_grad(), full_precision(layer.site.device):
        if isinstance(adapter, DeltaAdapter):
            update = adapter.delta(layer.tensors(name))
        else:
            update = layer.effective([name])[0] - layer.site.weight()
    matrix = update.float().cpu().numpy()
    return compress(Dense(matrix, rank=min(matrix.shape)), rank, numpy.random.default_rng(0)).factors


def _obstacle(attached: Attached, name: str) -> str | None:
    """What the adapter is or has besides updates of weights, or None."""
    if name in attached.prompts or name in attached.gates:
        return "a prompt" if name in attached.prompts else "a gate over adapters"
    if name in attached.biases:
        return "trained biases"
    config = attached.configs[name]
    if config.stored() is not config:
        return "a start taken from the base (save_pretrained stores it as plain LoRA)"
    for path, layer in attached.layers():
        if name not in layer.adapters:
            continue
        if layer.site.kind not in ("linear", "conv", "embedding"):
            return f"an adapted {layer.site.kind} ({path})"
        if layer.adapters[name].merge_problem() is not None:
            return "more than updates of weights"
        with torch.no_grad():
            bias, changed = layer.site.bias, layer.effective([name])[1]
        if bias is not None and changed is not None and not torch.equal(bias, changed):
            return f"a changed bias ({path})"
    return None
