"""Runs `peft` in children forked from one process that has imported everything, and kills them where it is told.

A request on stdin is one JSON line: `arguments`, `folder` (the current one, and the only one whose events count), and one of
    event: n          kill -9 before the n-th open for writing, fsync, rename, mkdir or removal below the folder
    bytes: n          kill as soon as a file grows beyond n bytes (the kernel does it, in the middle of whatever write)
    seconds: t        kill -9 after t seconds
    signals: [[s, t]] send signal s after t seconds each, counted from the third line of the run's log.jsonl if `log` is set
The answer: `code` (negative: the signal that ended it), `events` (how many there were), `seconds`, `out`, `err`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import peftcli.cli.train_run
import peftcli.data.prepare
import peftcli.training.model
import peftcli.training.outline
import peftcli.training.plan
import peftcli.training.worker  # noqa: F401
from peftcli.cli import main

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Events:
    """Counts what changes a folder, and kills this process before the n-th."""

    def __init__(self, folder: str, at: int | None, counter: int) -> None:
        self.folder, self.at, self.counter, self.count = folder, at, counter, 0
        fsync = os.fsync

        def watched(descriptor: Any) -> None:
            self.note()
            fsync(descriptor)

        os.fsync = watched
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING and self.below(path):
                self.note()
        elif event in CHANGES and self.below(arguments[0]):
            self.note()

    def below(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(os.fspath(path)).startswith(self.folder)

    def note(self) -> None:
        self.count += 1
        os.pwrite(self.counter, self.count.to_bytes(4, "little"), 0)
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def child(request: dict[str, Any], counter: int) -> None:
    """Never returns."""
    os.chdir(request["folder"])
    for number, name in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    Events(os.path.join(request["folder"], "run"), request.get("event"), counter)
    if "bytes" in request:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["bytes"], request["bytes"]))
    code = 99
    try:
        code = main(request["arguments"])
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def serve(request: dict[str, Any]) -> dict[str, Any]:
    counter = os.memfd_create("events")
    os.ftruncate(counter, 4)
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(request, counter)
    status = None
    if "log" in request:
        status = wait_for_log(pid, Path(request["folder"]) / "run/log.jsonl")
    clock = time.monotonic() if "log" in request else began
    moments = [(after, number) for number, after in request.get("signals", [])]
    if "seconds" in request:
        moments.append((request["seconds"], signal.SIGKILL))
    for after, number in sorted(moments):
        status = wait(pid, clock + after) if status is None else status
        if status is not None:
            break
        os.kill(pid, number)
    else:
        status = status if status is not None else wait(pid, time.monotonic() + 600)
    folder = Path(request["folder"])
    count = int.from_bytes(os.pread(counter, 4, 0), "little")
    os.close(counter)
    return {
        "code": os.waitstatus_to_exitcode(status) if status is not None else None,
        "events": count,
        "seconds": time.monotonic() - began,
        "out": (folder / ".out").read_text(errors="replace"),
        "err": (folder / ".err").read_text(errors="replace"),
    }


def wait_for_log(pid: int, log: Path) -> int | None:
    """The status of a child that ends before its log has three lines."""
    while not log.exists() or log.read_bytes().count(b"\n") < 3:
        if (status := wait(pid, time.monotonic() + 0.02)) is not None:
            return status
    return None


def wait(pid: int, until: float) -> int | None:
    """The status of a child that ends before `until`."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > until:
            return None
        time.sleep(0.005)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
