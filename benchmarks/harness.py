"""What every benchmark shares: commands run as child processes, in turn, and the ratio of what was measured.

Torch-free, standard library only: a subject's file is run with our Python and with the rival's.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

REPOSITORY = Path(__file__).resolve().parent.parent
ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
"""Large blocks are kept instead of being mapped anew for each tensor: worth 1.1 to 1.3 x, and given to both sides."""

MARK = "BENCH "
"""What the line with a child's measurements begins with."""


@dataclass(frozen=True)
class Command:
    """A child process.

    Attributes:
        side: whose Python runs it; `tool` is a program that is no Python's.
        arguments: after the Python: `-m`, module, options; of a tool the whole line. `{work}` is the folder for files,
            `{out}` a fresh one for each run.
    """

    side: Literal["ours", "rival", "tool"]
    arguments: tuple[str, ...]


def module(side: Literal["ours", "rival"], name: str, *options: str) -> Command:
    """A subject's file as a child, e.g. `module("ours", "training", "--dtype", "float32")`."""
    return Command(side, ("-m", f"benchmarks.{name}", "--side", side, "--work", "{work}", *options))


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        work: what is done.
        measure: `cpu` (s) or `peak` (MB) of the whole child, or a name the child reported.
        ours: what is judged.
        against: what it is judged by; None where the target is a number of seconds or megabytes.
        target: of against / ours where `better` is "more", else of ours / against (or of ours alone).
        better: which way is good.
        quick: part of `make bench-quick`.
    """

    work: str
    measure: str
    ours: Command
    against: Command | None
    target: float
    better: Literal["more", "less"] = "more"
    quick: bool = False


@dataclass(frozen=True)
class Subject:
    """Rows that belong together.

    Attributes:
        title: the heading of their table.
        rows: the comparisons.
        prepare: writes what the children read into the folder for files (and keeps what is there).
        note: what the table does not say.
    """

    title: str
    rows: Sequence[Row]
    prepare: Callable[[Path], None] = lambda work: None
    note: str = ""


@dataclass(frozen=True)
class Machine:
    """Where children run.

    Attributes:
        work: the folder for their files.
        rival: the rival's Python.
        threads: of both sides.
    """

    work: Path
    rival: Path
    threads: int = 1

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            "GLIBC_TUNABLES": ALLOCATOR,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONPATH": str(REPOSITORY),
        }

    def run(self, command: Command) -> dict[str, float]:
        """What one run of a command measured: its own report, and `cpu`, `peak`, `wall` of the whole process."""
        program = {"ours": [sys.executable], "rival": [str(self.rival)], "tool": []}[command.side]
        with tempfile.TemporaryDirectory(dir=self.work) as out:
            filled = [part.format(work=self.work, out=out) for part in command.arguments]
            began = time.perf_counter()
            with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
                child = subprocess.Popen(
                    [*program, *filled], stdout=stdout, stderr=stderr, env=self.environment(), cwd=REPOSITORY
                )
                _, status, usage = os.wait4(child.pid, 0)
                child.returncode = os.waitstatus_to_exitcode(status)
                wall = time.perf_counter() - began
                stdout.seek(0), stderr.seek(0)
                text, errors = stdout.read().decode(errors="replace"), stderr.read().decode(errors="replace")
        if child.returncode:
            raise RuntimeError(f"{' '.join([*program, *filled])} ended with {child.returncode}\n{errors[-4000:]}")
        measured = {"cpu": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss / 1024, "wall": wall}
        for line in text.splitlines():
            if line.startswith(MARK):
                measured |= json.loads(line.removeprefix(MARK))
        return measured


Results = dict[Command, list[dict[str, float]]]


def run_all(
    subjects: Sequence[Subject], machine: Machine, *, repeats: int, quick: bool
) -> Iterator[tuple[Subject, Results]]:
    """Every command of a subject's rows `repeats` times, in turn, so that a change of the machine's load hits all alike."""
    for subject in subjects:
        results: Results = {}
        rows = [row for row in subject.rows if row.quick or not quick]
        if not rows:
            continue
        subject.prepare(machine.work)
        commands = dict.fromkeys(c for row in rows for c in (row.against, row.ours) if c is not None)
        for turn in range(repeats):
            for command in commands:
                print(f"{subject.title} {turn + 1}/{repeats}: {command.side} {' '.join(command.arguments)}", flush=True)
                measured = machine.run(command)
                print("   ", {name: round(value, 3) for name, value in measured.items()}, flush=True)
                results.setdefault(command, []).append(measured)
        yield subject, results


@dataclass(frozen=True)
class Verdict:
    """What a row came to.

    Attributes:
        row: the row.
        ours, against: medians.
        value: the median of the turns' ratios, or our median alone.
        spread: lowest and highest value over the repeats.
    """

    row: Row
    ours: float
    against: float | None
    value: float
    spread: tuple[float, float]

    @property
    def reached(self) -> bool:
        return self.value >= self.row.target if self.row.better == "more" else self.value <= self.row.target


def verdict(row: Row, results: Results) -> Verdict | None:
    """A row judged by the medians of its runs, or None where it was not run."""
    if row.ours not in results or (row.against is not None and row.against not in results):
        return None
    ours = [run[row.measure] for run in results[row.ours]]
    if row.against is None:
        return Verdict(row, median(ours), None, median(ours), (min(ours), max(ours)))
    against = [run[row.measure] for run in results[row.against]]

    def ratio(of_ours: float, of_against: float) -> float:
        return of_against / of_ours if row.better == "more" else of_ours / of_against

    pairs = [ratio(a, b) for a, b in zip(ours, against, strict=True)]
    return Verdict(row, median(ours), median(against), median(pairs), (min(pairs), max(pairs)))


# -- for children ---------------------------------------------------------------------------------------------------


def report(**measured: float) -> None:
    """Tell the harness what was measured in this child."""
    print(MARK + json.dumps(measured), flush=True)


@contextmanager
def watched(measured: dict[str, Any]) -> Iterator[None]:
    """Put CPU seconds and the memory added at its peak (MB) of a block into `measured`, as `seconds` and `memory`."""
    ctypes.CDLL(None).malloc_trim(0)  # what loading left free would hide as much of what the block takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, began = _status("VmRSS"), time.process_time()
    yield
    measured |= {"seconds": time.process_time() - began, "memory": (_status("VmHWM") - before) / 1024}


def _status(name: str) -> int:
    """A number of kB from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
