"""Signals that ask a run to stop: the running step is finished and saved first."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from peftcli.errors import RunError
from peftcli.launchers.run import deserted

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class Interrupted(RunError):
    """The run was asked to stop and did, resumably; the exit code is the shell's, 128 + signal."""

    def __init__(self, number: int, *, after: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {after}, which was saved; `--resume auto` continues")
        self.exit_code = 128 + number


class StopSignals:
    """While open, SIGTERM, SIGUSR1 and the first SIGINT are noted in `received`; a second SIGINT ends at once.

    A rank whose run's own process was killed goes on as if it had received SIGTERM: nobody else would ever stop it.
    """

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[int, Any] = {}

    @property
    def received(self) -> int:
        return self._received or (int(signal.SIGTERM) if deserted() else 0)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or number
