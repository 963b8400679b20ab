"""`peft eval`: base and adapter side by side on held-out data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftcli.cli import console
from peftcli.errors import EXIT_FAILURE, InputError, printable

if TYPE_CHECKING:
    from peftcli.evaluation.compare import Comparison, Item, Progress, Row

MAX_LOST = 5
MAX_SAMPLES_SHOWN = 3
MAX_TEXT = 160  # characters of a prompt or an answer on the screen


def command(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER|RECIPE", help="Adapter or run folder, trained recipe, or hub id.")
    ],
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Data to evaluate on; by default the run's own evaluation data.")
    ] = None,
    metrics: Annotated[
        str, typer.Option(metavar="NAMES", help="loss, perplexity, exact_match, contains; separated by commas.")
    ] = "loss,perplexity",
    generate: Annotated[bool, typer.Option("--generate", help="Show generated answers, whatever the metrics.")] = False,
    base: Annotated[str | None, typer.Option(help="Base to use instead of the one the adapter was trained on.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write everything as JSON.")
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Exit with 1 if the adapter is worse than this; may be given again."),
    ] = None,
    format: Annotated[str | None, typer.Option(help="Format of FILE, if not that of the training data.")] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Evaluate on at most this many samples.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest generated answer; by default a little over the longest expected.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers generated at a time.")] = 32,
) -> int:
    """Compare a base model with its adapter: one run, the adapter switched off for the base's turn."""
    from peftcli.evaluation.metrics import find
    from peftcli.evaluation.subject import find_subject

    thresholds = dict(_threshold(text) for text in fail_under or [])
    names = list(dict.fromkeys([*(name.strip() for name in metrics.split(",")), *thresholds]))
    for name in names:
        find(name, "--metrics")
    if output is not None and not output.parent.is_dir():
        raise InputError("there is no such folder", place=output.parent, field="--output")
    subject = find_subject(adapter, base)
    console.note(f"base {subject.model.name_or_path}")

    from peftcli.evaluation.compare import compare

    tokenizer = subject.tokenizer()
    samples, warnings = subject.data(tokenizer, data, format=format, max_samples=max_samples)
    for warning in warnings:
        console.note(f"warning: {warning}")
    with _progress() as progress:
        comparison = compare(
            subject.load(),
            tokenizer,
            samples,
            names,
            generated=generate,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            bf16=subject.bf16,
            progress=progress,
        )
    if output is not None:
        about = {"adapter": str(subject.adapter), "base": subject.model.name_or_path, "data": data}
        _write(output, {**about, "samples": len(samples), **comparison.to_dict()})
    _show(comparison)
    missed = comparison.missed(thresholds)
    for sentence in missed:
        console.fail(sentence)
    return EXIT_FAILURE if missed else 0


def _threshold(text: str) -> tuple[str, float]:
    """`exact_match=0.6` taken apart."""
    from peftcli.evaluation.metrics import find

    name, _, number = text.partition("=")
    find(name, "--fail-under")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{printable(repr(text))} names no number", field="--fail-under", allowed="exact_match=0.6")
    return name, value


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal's stderr; silent elsewhere."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    screen = Console(stderr=True)
    with Bar(console=screen, transient=True, disable=not screen.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield update


def _write(path: Path, values: dict[str, Any]) -> None:
    """The file appears whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _show(comparison: Comparison) -> None:
    console.table(("metric", "n", "base", "tuned", "delta"), [_cells(row) for row in comparison.rows])
    if comparison.lost:
        shown = f", the first {MAX_LOST}" if len(comparison.lost) > MAX_LOST else ""
        console.say(f"The base had right and the adapter has wrong: {len(comparison.lost)}{shown}", style="bold")
        _show_items(comparison.lost[:MAX_LOST])
    if comparison.items:
        console.say("Samples", style="bold")
        _show_items(comparison.items[:MAX_SAMPLES_SHOWN])


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float, sign: str = "") -> str:
        return f"{value:{sign}.4f}" if abs(value) < 1000 else f"{value:{sign}.4g}"

    delta = f"{number(row.delta.value, '+')} ± {number(row.delta.standard_error)}"
    return row.metric, str(row.count), number(row.base.value), number(row.tuned.value), delta


def _show_items(items: list[Item]) -> None:
    for item in items:
        texts = {"question": item.question, "expected": item.expected, "base": item.base, "tuned": item.tuned}
        for name, text in texts.items():
            console.say(f"  {name:<8}  {_one_line(text, from_end=name == 'question')}")
        console.say()


def _one_line(text: str, from_end: bool) -> str:
    """A text on one line; of a long prompt the end is shown, of a long answer the beginning."""
    line = " ".join(text.split())
    if len(line) <= MAX_TEXT:
        return line
    return f"...{line[-MAX_TEXT:]}" if from_end else f"{line[:MAX_TEXT]}..."
