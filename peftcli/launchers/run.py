"""Running the worker: in this process, or in several under a launcher whose failure is ours."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

from peftcli.errors import EXIT_BAD_INPUT, InputError, RunError, printable
from peftcli.launchers.command import Command

LOG = "launcher.log"
INTERRUPTED = "Interrupted"
"""How the log of a rank begins that a signal on another machine has stopped; the exit code follows."""

REASONS = {
    "DistNetworkError": "machine 0 does not answer: is `peft train` running there with launcher.machine_rank=0, and do "
    "launcher.main_process_ip and main_process_port lead to it? launcher.timeout says how long it is waited for",
    "DistStoreError": "not all machines have come: is `peft train` running on each with a launcher.machine_rank of its "
    "own? launcher.timeout says how long they are waited for",
    "Tried to launch distributed communication on port": "launcher.main_process_port is taken by another process",
}
"""What the launcher's last words mean, where its ranks have said nothing."""

KILLED = re.compile(r"^  rank +: (\d+) .*\n  exitcode +: -(\d+) ", re.MULTILINE)
"""In torchrun's summary of a failure: a rank that a signal has ended."""

STARTED_BY = "PEFTCLI_STARTED_BY"
"""For the ranks: the number of the process that waits for them."""

SHOWN_LINES = 12
PASSED_ON = {
    number: signal.Signals[passed]
    for name, passed in (("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGUSR1", "SIGUSR1"), ("SIGHUP", "SIGTERM"))
    if (number := getattr(signal, name, None)) is not None
}
"""What the ranks get when we get a signal."""


def run(command: Command, run_folder: Path, *, quiet: bool = False) -> None:
    """Start the processes and wait for them.

    What the launcher and the ranks write to stderr goes to `launcher.log` in the run folder.

    Args:
        quiet: keep stdout free of the ranks' output too.

    Raises:
        RunError: if a rank failed, with the end of its `rank-N.log`; or with the shell's exit code after a signal.
        InputError: if the launcher refused its arguments.
    """
    (run_folder / LOG).unlink(missing_ok=True)  # never written through a link
    with (run_folder / LOG).open("xb") as log:
        process = subprocess.Popen(
            command.argv,
            env={**os.environ, **command.environment, STARTED_BY: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=log if quiet else None,
            stderr=log,
            start_new_session=True,  # else a terminal's Ctrl-C would reach the ranks twice: from it and from us
        )
        with passing_signals_on(partial(_to_ranks, process.pid)) as received:
            code = process.wait()
    if code == 0:
        return
    if received:
        error = RunError(f"stopped by {signal.Signals(received[0]).name}; `--resume auto` continues")
        error.exit_code = 128 + received[0]
        raise error
    raise _failure(code, command, run_folder)


@contextmanager
def passing_signals_on(send: Callable[[int], None]) -> Iterator[list[int]]:
    """While open, signals that ask us to stop are sent on instead, each once; `received` holds them.

    Args:
        send: gives a signal's number to whoever does the work.
    """
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        send(number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _to_ranks(launcher: int, number: int) -> None:
    """Past the launcher: told to stop, it would kill its ranks after 30 seconds, in the middle of a save."""
    for pid in _children(launcher) or [launcher]:
        with suppress(ProcessLookupError):
            os.kill(pid, PASSED_ON[number])


def _children(pid: int) -> list[int]:
    import psutil  # comes with accelerate

    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def deserted() -> bool:
    """Whether this is a rank, and the process that started the run is gone: killed, so that it could say nothing."""
    starter = os.environ.get(STARTED_BY)
    if starter is None:
        return False
    import psutil

    try:  # the launcher, which is between the two, has another parent then
        return psutil.Process(os.getppid()).ppid() != int(starter)
    except psutil.NoSuchProcess:
        return True


def _failure(code: int, command: Command, run_folder: Path) -> RunError | InputError:
    reports = sorted(run_folder.glob("rank-*.log"), key=lambda path: path.stat().st_mtime)
    if killed := _killed(run_folder / LOG):
        return killed
    if reports:
        first = reports[0]
        kind, _, message = _last_lines(first, 1).partition(": ")
        if kind in ("InputError", "InputErrors"):
            return InputError(message)
        if kind == INTERRUPTED:
            number, _, message = message.partition(": ")
            error = RunError(f"another machine was asked to stop: {message}")
            error.exit_code = int(number)
            return error
        said = f"{first.stem.replace('-', ' ')} failed: {_last_lines(first, 1)}\n"
        if kind != "RunError":  # nobody foresaw it: where it happened tells more
            said += _last_lines(first, SHOWN_LINES).rpartition("\n")[0] + "\n"
        return RunError(f"{said}  all of it: {first}")
    log = run_folder / LOG
    if code == EXIT_BAD_INPUT:  # argparse's code: the launcher did not understand an argument
        return InputError(f"the launcher refused its arguments:\n{_last_lines(log, 2)}", place="after `--`")
    last = _last_lines(log, 1)
    for words, meaning in REASONS.items():
        if words in last:
            return RunError(f"{meaning}\n  it said: {last}\n  all of it: {log}")
    return RunError(f"the launcher failed with exit code {code}:\n{_last_lines(log, SHOWN_LINES)}\n  all of it: {log}")


def _killed(log: Path) -> RunError | None:
    """What to say where a signal has ended a rank, whatever the others made of its silence."""
    ended = [(int(rank), int(number)) for rank, number in KILLED.findall("\n".join(_lines(log)))]
    # The launcher ends those that are left by SIGTERM.
    first = next(((rank, number) for rank, number in ended if number not in (signal.SIGTERM, signal.SIGINT)), None)
    if first is None:
        return None
    rank, number = first
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    why = ": was there too little memory? (`dmesg` says so)" if name == "SIGKILL" else ""
    return RunError(f"rank {rank} was ended by {name}{why}\n  all of it: {log}")


def _last_lines(path: Path, count: int) -> str:
    return printable("\n".join(_lines(path)[-count:]), 4000)


def _lines(path: Path) -> list[str]:
    """The last lines of a file, of which it may have many; without blank ones."""
    with path.open("rb") as file:
        _skip_to_end(file, 64 << 10)
        return [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]


def _skip_to_end(file: IO[bytes], size: int) -> None:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - size))


def worker_arguments(run_folder: Path, resume: str | None) -> Sequence[str]:
    """The worker's own command line."""
    return [str(run_folder), *(["--resume", resume] if resume else [])]
