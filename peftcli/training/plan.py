"""The memory plan: what a run will hold on each device, by part, against what is there.

Where each number comes from:

| part | from |
|---|---|
| base, adapter | shapes and types of the model's tensors, tied ones once |
| gathered | of a base sharded by FSDP or ZeRO-3: what is in no layer, and two layers |
| in main memory | what FSDP or ZeRO offloads: no part of the peak, but of what a machine must have for its processes |
| gradients, optimizer | a step of the real optimizer on tensors without data (`footprint.py`) |
| activations, logits | the forward and backward pass over the heaviest batch on tensors without data |
| file | pages of the checkpoint, which stay mapped beside weights that are converted; on the CPU only |
| libraries | resident size of a process that has imported what training needs; on the CPU only, measured |
| allocator | memory that is freed and not given back, on the CPU with an older C library only, measured |
| peak | the most of all parts at one moment |

A batch counts without its padding, as it is trained, where nothing known of the model and its adapter speaks against it.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: TID253

from peftcli.data.collate import MULTIPLE
from peftcli.data.tokens import TokenDataset
from peftcli.errors import PeftCliError
from peftcli.launchers.configs import offloaded, shards_base
from peftcli.lazy import numpy as np
from peftcli.recipe.schema import Recipe
from peftcli.training.batches import row_length
from peftcli.training.footprint import BatchShape, Footprint, footprint
from peftcli.training.model import open_base, training_device

LIBRARIES = 470_000_000
"""Resident bytes of a `peft train` whose model is tiny (torch 2.13, Linux)."""

KEPT_FREED = 0.2
"""Freed bytes that glibc before 2.38 keeps, as a part of what a forward pass takes from its heap.

torch asks for aligned blocks, and those versions cut slivers off them that small objects settle in, so that a freed
block is seldom joined with its neighbours and used again. Measured on SmolLM2-135M with batches of 500 tokens: 0.10 to 0.23
(LoRA, LoRA checkpointed, QLoRA, QLoRA checkpointed: 0.10, 0.17, 0.19, 0.23).
"""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes one process needs on its device, and what is there for it.

    Attributes:
        device: `cpu`, `cuda:0`.
        parts: of the tensors.
        file: of the checkpoint, while weights are made of it that are of another type.
        libraries: what the process holds besides tensors.
        allocator: what it holds of tensors that are gone.
        available: what is there; shared fairly between processes that share a device.
        available_main: main memory for this process, where something is offloaded to it.
    """

    device: str
    parts: Footprint
    file: int
    libraries: int
    allocator: int
    available: int
    available_main: int | None = None

    @property
    def peak(self) -> int:
        return self.parts.peak + self.file + self.libraries + self.allocator

    @property
    def fits(self) -> bool:
        """Here, and in main memory."""
        return self.peak <= self.available and self.main <= (self.available_main or self.main)

    @property
    def main(self) -> int:
        """Bytes of what is offloaded, with the libraries that every process has there."""
        parts = self.parts
        return LIBRARIES + sum(getattr(parts, name) for name in parts.offloaded) if parts.offloaded else 0

    def offloaded_rows(self) -> Iterator[tuple[str, int]]:
        """Part and bytes in main memory, of a process on another device; the last is their sum."""
        if self.parts.offloaded:
            yield from ((name, getattr(self.parts, name)) for name in self.parts.offloaded)
            yield "libraries", LIBRARIES
            yield "sum", self.main

    def rows(self) -> Iterator[tuple[str, int]]:
        """Part and bytes, what is nothing left out; the last is the peak, less than the sum of parts."""
        parts = self.parts
        named = {
            "base": parts.base,
            "gathered": parts.gathered,
            "adapter": parts.adapter,
            "gradients": parts.gradients,
            "optimizer": parts.optimizer,
            "activations": parts.activations,
            "logits": parts.logits,
            "file": self.file,
            "libraries": self.libraries,
            "allocator": self.allocator,
            "peak": self.peak,
        }
        return ((name, size) for name, size in named.items() if size and name not in parts.offloaded)


def plan_memory(
    recipe: Recipe,
    train: TokenDataset,
    evaluation: TokenDataset | None = None,
    *,
    processes: int = 1,
    device: torch.device | None = None,
) -> MemoryPlan | None:
    """What each process of a run will need; None for a model that can't be followed without data.

    That is one whose course depends on values (routed experts, some of them), or an operation that knows no shapes.

    Args:
        recipe: the run.
        train: its training data.
        evaluation: its evaluation data.
        processes: of all machines; each holds the whole model, unless FSDP or ZeRO-3 shards it.
        device: of one of them; `training_device()` when None.

    Raises:
        InputError: the base can't be used, or the adapter does not fit it.
    """
    device = device or training_device()
    settings = recipe.training
    batch = heaviest_batch(train, settings.per_device_train_batch_size, row_length(recipe))
    held_out = heaviest_batch(evaluation, settings.per_device_eval_batch_size) if evaluation is not None else None
    try:
        with _quiet_fake_tensors():
            sharded_over = processes if shards_base(recipe) else 1
            moved = offloaded(recipe) if device.type != "cpu" else frozenset()
            parts = footprint(recipe, batch, held_out, device=device, sharded_over=sharded_over, offloaded=moved)
    except PeftCliError:
        raise
    except Exception:  # a run may do without its plan, and a model without data may stumble anywhere
        return None
    main = available_memory(torch.device("cpu")) // (processes // recipe.launcher.num_machines)
    if device.type != "cpu":
        return MemoryPlan(str(device), parts, 0, 0, 0, available_memory(device), main)
    allocator = int(KEPT_FREED * parts.forward) if _has_old_glibc() else 0
    return MemoryPlan("cpu", parts, _converted(recipe), LIBRARIES, allocator, main)


def _converted(recipe: Recipe) -> int:
    """Bytes of the checkpoint, if its weights are not used as they are in the file."""
    base = open_base(recipe.model)
    if base.dtype == base.stored_dtype and recipe.quantization is None:
        return 0
    return sum(tensor.nbytes for tensor in base.facts.tensors.values())


def heaviest_batch(data: TokenDataset, size: int, row_length: int | None = None) -> BatchShape:
    """A batch of the `size` longest samples, with the most labels that any `size` samples have.

    With `row_length` samples are packed: `size` full rows, all of it learnt.
    """
    if row_length is not None:
        rows = min(size, -(-int(data.lengths.sum()) // row_length))
        labels = min(rows * row_length, int(data.label_counts.sum()))
        return BatchShape(rows, row_length, labels, (row_length,) * rows)
    rows = min(size, len(data))
    longest = np.sort(data.lengths)[-rows:]
    length = -(-int(longest[-1]) // MULTIPLE) * MULTIPLE
    return BatchShape(rows, length, int(np.sort(data.label_counts)[-rows:].sum()), tuple(longest.tolist()))


def available_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device; on the CPU within the limit of the container."""
    if device.type != "cpu":
        return torch.accelerator.get_memory_info(device)[0]
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    table = Path("/proc/meminfo")
    if table.exists():
        lines = dict(line.split(":") for line in table.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int((group / "memory.current").read_text()))
    return free


@contextmanager
def _quiet_fake_tensors() -> Iterator[None]:
    """torch logs the traceback of an operation it can't follow, besides raising it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _has_old_glibc() -> bool:
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split("."))) < (2, 38)
