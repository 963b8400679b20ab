"""LoftQ for a base that is quantised already: A and B make up for what its codes lost, one module at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters.engine import adapters_of
from peftcli.adapters.methods.lora import Lora
from peftcli.adapters.quantized import Linear4bitSite
from peftcli.errors import InputError


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Start a LoRA adapter on 4-bit layers where W - q is closest to s B A (LoftQ with one iteration, the codes fixed).

    Args:
        peft_model: a model loaded in 4 bit, with a LoRA adapter.
        model_path: folder with the original weights as safetensors; the adapter's base if None.
        adapter_name: the adapter.
        callback: called with the model and each module's name; False puts that module's A and B back.

    Raises:
        InputError: if the originals are not there, or no layer is quantised to 4 bits.
    """
    attached = adapters_of(peft_model)
    base = model_path or attached.configs[adapter_name].base_model_name_or_path
    found = False
    for path, layer in attached.layers():
        if not isinstance(layer.site, Linear4bitSite) or adapter_name not in layer.adapters:
            continue
        found = True
        adapter = cast(Lora, layer.adapters[adapter_name])
        a, b = adapter.pair(layer.tensors(adapter_name))
        before = a.clone(), b.clone()
        lost = _original(Path(str(base)), layer.site.name).float() - layer.site.weight().float()
        u, s, vh = torch.linalg.svd(lost, full_matrices=False)
        root = (s[: adapter.r] / adapter.scaling).sqrt()
        a.copy_(root[:, None] * vh[: adapter.r])
        b.copy_(u[:, : adapter.r] * root)
        if callback is not None and not callback(peft_model, path):
            a.copy_(before[0])
            b.copy_(before[1])
    if not found:
        raise InputError("No bnb LoRA module found on the model", fix="load the base with load_in_4bit")


def _original(folder: Path, module: str) -> Tensor:
    """The original weight of a module, from a folder of safetensors files."""
    from safetensors import safe_open

    for path in _files(folder):
        with safe_open(path, "pt") as file:
            held: Any = file
            for name in (
                f"{module}.weight",
                f"{module.partition('.')[2]}.weight",
            ):  # some files leave the model's prefix out
                if name in held.keys():  # noqa: SIM118  # not a dict
                    return held.get_tensor(name)
    raise InputError(f"no tensor `{module}.weight` among the original weights", place=folder, field="model_path")


def _files(folder: Path) -> Iterator[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError("holds no safetensors files with the original weights", place=folder, field="model_path")
    yield from files
