"""The command line and environment that start the worker's processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peftcli.launchers import configs, machines

if TYPE_CHECKING:
    from peftcli.recipe.schema import LauncherSection

WORKER = "peftcli.training.worker"


@dataclass(frozen=True)
class Command:
    """A process to start.

    Attributes:
        argv: program and arguments.
        environment: variables set on top of the current ones.
    """

    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def processes(launcher: LauncherSection) -> int:
    """How many processes the run has on all machines: as asked for, or one for each GPU, or one on each machine."""
    if launcher.num_processes != "auto":
        return launcher.num_processes
    if launcher.type == "none":
        return 1
    from peftcli.lazy import torch

    return max(1, torch.cuda.device_count()) * launcher.num_machines


def in_process(launcher: LauncherSection) -> bool:
    """Whether the worker runs in this process."""
    return launcher.type == "none" or (launcher.type == "auto" and processes(launcher) == 1)


def command(
    launcher: LauncherSection, worker_arguments: Sequence[str], extra: Sequence[str] = (), *, base: Mapping[str, str]
) -> Command:
    """The accelerate command that runs the worker in `processes(launcher)` processes.

    Args:
        worker_arguments: what the worker's own command line gets.
        extra: arguments typed after `--`, given to the launcher after ours, so that they win.
        base: the current environment.
    """
    count = processes(launcher)
    named = launcher.config if launcher.type in ("auto", "accelerate") else None
    config = configs.find("accelerate", named or ("ddp" if count > 1 else "single"))
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    argv += [
        "--num_processes",
        str(count),
        *machines.arguments(launcher),
        *extra,
        "--module",
        WORKER,
        *worker_arguments,
    ]
    return Command(argv, _environment(base, count // launcher.num_machines))


def _environment(base: Mapping[str, str], count: int) -> dict[str, str]:
    """Threads are shared out among the processes, where the user has not decided."""
    threads = max(1, (os.cpu_count() or 1) // count)
    wanted = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return {name: value for name, value in wanted.items() if name not in base}
