"""RESULTS.md and its bar chart."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks.harness import ALLOCATOR, Machine, Subject, Verdict

PACKAGES = ("peft", "transformers", "accelerate", "torch")


def write(tables: Sequence[tuple[Subject, list[Verdict]]], folder: Path, machine: Machine, *, repeats: int) -> None:
    """Write `RESULTS.md` and `results.png` into `folder`."""
    lines = [
        "# Results",
        "",
        f"Measured {date.today()} with `make bench`. {_machine()}, {machine.threads} thread(s) a process on both sides.",
        f"Ours: {_ours()}. The rival: {_rivals(machine)}.",
        f"Medians of {repeats} runs, the two sides in turn, and of their ratios, turn by turn; in brackets the lowest and highest.",
        f"Times are CPU seconds, since other work shares the machine. Both sides run with `GLIBC_TUNABLES={ALLOCATOR}`.",
        "",
        "![ratios against their targets](results.png)",
    ]
    for subject, verdicts in tables:
        lines += ["", f"## {subject.title}", *([subject.note, ""] if subject.note else [])]
        lines += ["| work | ours | against | ratio | target | |", "|---|---:|---:|---:|---:|---|"]
        lines += [_line(verdict) for verdict in verdicts]
    (folder / "RESULTS.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot([verdict for _, verdicts in tables for verdict in verdicts], folder / "results.png")


def _line(verdict: Verdict) -> str:
    row, (low, high) = verdict.row, verdict.spread
    times = "x" if verdict.against is not None else ""
    against = "" if verdict.against is None else f"{verdict.against:.3g}"
    sign = "≥" if row.better == "more" else "≤"
    ratio = f"{_short(verdict.value)}{times} ({_short(low)}-{_short(high)})"
    mark = "reached" if verdict.reached else "**missed**"
    return f"| {row.work} | {verdict.ours:.3g} | {against} | {ratio} | {sign} {row.target:g}{times} | {mark} |"


def _short(value: float) -> str:
    """Two places, or two digits of what would be nothing then."""
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1e}"


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = sum(line.startswith("processor") for line in lines)
    memory = int(Path("/proc/meminfo").read_text().split()[1]) >> 20
    return f"{name}, {cores} cores, {memory} GB, no GPU, Python {platform.python_version()}"


def _ours() -> str:
    from peftcli import __version__

    return ", ".join([f"peftcli {__version__}", *(f"{name} {version(name)}" for name in PACKAGES[1:])])


def _rivals(machine: Machine) -> str:
    code = f"from importlib.metadata import version; print(', '.join(n + ' ' + version(n) for n in {PACKAGES!r}))"
    return subprocess.run([machine.rival, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _plot(verdicts: Sequence[Verdict], path: Path) -> None:
    """Bars of (how far each row is beyond its target): 1 is the target, to the right of it is better."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = [v.value / v.row.target if v.row.better == "more" else v.row.target / v.value for v in verdicts]
    figure = Figure(figsize=(10, 1.2 + 0.34 * len(verdicts)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = list(range(len(verdicts)))[::-1]
    axes.barh(places, shares, color=["#3b7dd8" if v.reached else "#d8783b" for v in verdicts])
    for place, share, verdict in zip(places, shares, verdicts, strict=True):
        unit = "x" if verdict.against is not None else ""
        axes.text(share, place, f" {verdict.value:.3g}{unit}", va="center", fontsize=8)
    axes.set_yticks(places, [v.row.work for v in verdicts], fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("measured / target (to the right of 1: better than the target)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
