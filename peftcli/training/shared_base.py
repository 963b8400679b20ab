"""Loading a base that processes share, so that none of them holds more of it than it keeps.

A weight is mapped from its file, and its pages are read when it is: by whatever starts an adapter from it, and by the
process whose part it is. Weights that are converted or quantised are written once on each machine by one process, which
holds them whole for that time, and mapped by all.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch  # noqa: TID253
from accelerate.utils import broadcast_object_list  # noqa: TID253

from peftcli.training import checkpoints
from peftcli.training.model import load_base, name_base, open_base
from peftcli.training.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftcli.recipe.schema import ModelSection, QuantizationSection

M_MMAP_THRESHOLD = -3
FROM_SYSTEM = 1 << 20
"""Blocks of so many bytes are given back to the system when they are freed, see `return_freed_blocks`."""

WEIGHTS = (".safetensors", ".bin", ".gguf", ".index.json")


def load_mapped(model: ModelSection, quantization: QuantizationSection | None, scratch: Path) -> PreTrainedModel:
    """As `load_base`, in main memory. Every process calls this.

    Args:
        model: the recipe's section.
        quantization: the recipe's.
        scratch: this machine's folder, where converted weights lie until all processes have mapped them.

    Raises:
        RunError: there is no room for them.
    """
    _call_glibc("malloc_trim", 0)  # what a run has freed, when its base is loaded again to verify the result
    base = open_base(model)
    quantized_here = quantization is not None and "quantization_config" not in base.facts.config
    if (base.dtype == base.stored_dtype and not quantized_here) or model.trust_remote_code:
        return load_base(model, quantization, device="cpu")
    folder = scratch / f".tmp-0-{os.getppid()}-base"  # the launcher's number: swept away once that is gone
    converts = os.environ.get("LOCAL_RANK", "0") == "0"
    if converts:
        _write_converted(model, quantization, base.facts.folder, folder)
        _call_glibc("malloc_trim", 0)
    while not folder.exists():  # no collective: converting may take longer than those are waited for
        time.sleep(0.05)
    section = model.model_copy(update={"name_or_path": str(folder), "revision": None})
    with torch.random.fork_rng(devices=[]):
        loaded = load_base(section, quantization, device="cpu")
    # Starts that draw numbers must draw the same; and nobody deletes what others have yet to map.
    torch.set_rng_state(broadcast_object_list([torch.get_rng_state()])[0])
    if converts:
        checkpoints.remove(folder)
    name_base(loaded, model.name_or_path)
    return loaded


def _write_converted(model: ModelSection, quantization: QuantizationSection | None, source: Path, target: Path) -> None:
    """A base as it is used, with everything else that its folder holds; `target` appears whole."""
    loaded = load_base(model, quantization, device="cpu")
    needed = sum(tensor.nbytes for tensor in loaded.state_dict().values())
    with checkpoints.temporary_folder(target.parent, 0, needed=needed) as made:
        with quiet_transformers():
            loaded.save_pretrained(made)
        for item in source.iterdir():
            if not item.name.endswith(WEIGHTS) and not (made / item.name).exists():
                (made / item.name).symlink_to(item.resolve())
        os.rename(made, target)


def return_freed_blocks() -> None:
    """Let glibc give larger blocks back to the system as soon as they are freed. Other C libraries have no such switch.

    Gathered layers come and go in blocks that it would keep in its heap, in pieces: SmolLM2-135M over two processes had
    2.5 GB resident after three steps, and 1.4 GB so.
    """
    _call_glibc("mallopt", M_MMAP_THRESHOLD, FROM_SYSTEM)


def _call_glibc(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
    if function is not None:
        function(*arguments)
