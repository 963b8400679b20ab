"""A run over several machines: what each is started with, as commands and as a script for Slurm.

`peft train` runs on each machine with the same recipe and its own `launcher.machine_rank`. Each prepares the data for
itself, so that nothing but the recipe, the data and the base has to be there; machine 0 writes the results.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peftcli.errors import InputError, InputErrors

if TYPE_CHECKING:
    from peftcli.recipe.schema import LauncherSection, Recipe

MAIN_PORT = 29500
"""Where processes of several machines meet, unless the recipe says; accelerate's own default."""


def machine_folder(run_folder: Path, rank: int) -> Path:
    """Where a machine keeps what it has prepared, and its logs: the run folder, on machine 0.

    The others have a folder of their own inside, whether or not they see the one of machine 0.
    """
    return run_folder / f"machine-{rank}" if rank else run_folder


def require_meeting_point(launcher: LauncherSection) -> None:
    """Refuse to start on one of several machines that does not know which it is, or where the others are.

    Raises:
        InputErrors: naming each field that is missing.
    """
    if launcher.num_machines == 1:
        return
    needed = {
        "machine_rank": f"which of the {launcher.num_machines} this is, 0 to {launcher.num_machines - 1}",
        "main_process_ip": "the address of machine 0",
    }
    missing = [
        InputError(
            "is needed with several machines",
            field=f"launcher.{name}",
            fix=f"launcher.{name}=... ({meaning}); `--emit commands` and `--emit slurm` write it for each machine",
        )
        for name, meaning in needed.items()
        if getattr(launcher, name) is None
    ]
    if missing:
        raise InputErrors(missing)


def arguments(launcher: LauncherSection) -> list[str]:
    """For accelerate: where the processes of all machines meet."""
    port = launcher.main_process_port
    if launcher.num_machines == 1:
        return [] if port is None else ["--main_process_port", str(port)]
    return [
        *("--num_machines", str(launcher.num_machines), "--machine_rank", str(launcher.machine_rank)),
        *("--main_process_ip", str(launcher.main_process_ip), "--main_process_port", str(port or MAIN_PORT)),
        *("--rdzv_conf", f"timeout={launcher.timeout}"),
    ]


def commands(recipe: Recipe, command: Sequence[str], extra: Sequence[str]) -> str:
    """What to type on each machine, a line for each.

    Args:
        command: `peft train` and all that was typed behind it, up to `--`.
        extra: what stood behind it.

    Raises:
        InputError: nobody knows where machine 0 is.
    """
    count = recipe.launcher.num_machines
    if count == 1:
        return shlex.join([*command, *_tail(extra)])
    require_meeting_point(recipe.launcher.model_copy(update={"machine_rank": 0}))
    command = _without(command, "machine_rank")
    return "\n".join(shlex.join([*command, f"launcher.machine_rank={rank}", *_tail(extra)]) for rank in range(count))


def slurm(recipe: Recipe, command: Sequence[str], extra: Sequence[str]) -> str:
    """A script for `sbatch` that starts the run on as many nodes as it has machines. Arguments as for `commands`.

    Raises:
        InputError: the recipe does not say how many processes there are.
    """
    launcher = recipe.launcher
    if launcher.num_processes == "auto":
        raise InputError(
            "is auto, but a job says how many GPUs it needs",
            field="launcher.num_processes",
            fix="set it to the number of GPUs of all machines together",
        )
    place = ["launcher.machine_rank=$SLURM_NODEID", "launcher.main_process_ip=$MAIN_PROCESS_IP"]
    several = launcher.num_machines > 1
    command = _without(command, "machine_rank", "main_process_ip")
    started = " ".join([shlex.join(command), *(place if several else []), shlex.join(_tail(extra))]).rstrip()
    find = 'export MAIN_PROCESS_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n' if several else ""
    return f"""\
#!/bin/bash
#SBATCH --job-name={shlex.quote(Path(recipe.training.output_dir).name)}
#SBATCH --nodes={launcher.num_machines}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={launcher.num_processes // launcher.num_machines}
#SBATCH --exclusive
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append

# Five minutes before its time is up the run finishes its step, saves, and exits with 138: submit again with --resume auto.
{find}srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" bash -c {shlex.quote("exec " + started)}"""


def _without(command: Sequence[str], *fields: str) -> list[str]:
    """A command without the overrides of some of the launcher's fields."""
    return [part for part in command if part.partition("=")[0] not in {f"launcher.{field}" for field in fields}]


def _tail(extra: Sequence[str]) -> list[str]:
    return ["--", *extra] if extra else []
