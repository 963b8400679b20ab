"""What `peft train` shows before and after training."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from peftcli.cli import console
from peftcli.errors import printable
from peftcli.inspection.recipe import method_line
from peftcli.recipe.adapter_section import FULL
from peftcli.recipe.task_rules import task_of
from peftcli.training.schedule import warmup_steps

if TYPE_CHECKING:
    from peftcli.cli.train_run import Setup
    from peftcli.data.report import PartReport
    from peftcli.recipe.schema import Recipe
    from peftcli.training.plan import MemoryPlan
    from peftcli.training.publish import RunResult

MAX_SAMPLE = 3000  # characters of a sample on the screen
MAX_CLASSES = 8


def show(setup: Setup) -> None:
    """Recipe, base, adapter, data, audit, plan and memory."""
    request, report = setup.request, setup.prepared.report
    console.facts(request.file, [("override", text) for text in request.overrides])
    console.facts("model", _model(setup))
    console.facts("data", _data(setup))
    console.facts("audit", [("ok  " if fact.ok else "LOOK", f"{fact.name}: {fact.seen}") for fact in report.audit])
    for warning in report.warnings:
        console.say(f"  note  {warning}", style="yellow")
    console.facts("plan", _plan(setup))
    if warmup_steps(request.recipe.training, setup.steps) >= setup.steps > 1:
        console.say("  note  the learning rate never reaches its peak: all steps are to warm up", style="yellow")
    _show_memory(setup.memory)
    console.say()


def show_sample(setup: Setup) -> None:
    """The first training sample, what is given apart from what is learnt, a bar between tokens."""
    ids, supervised = setup.prepared.train[0]
    how_many = f", {int(supervised.sum())} learnt" if supervised.any() else ""
    console.say(f"first sample: {len(ids)} tokens{how_many}{_target(setup)}", style="bold")
    left = MAX_SAMPLE
    for learnt, run in groupby(zip(ids.tolist(), supervised.tolist(), strict=True), key=lambda pair: pair[1]):
        text = "|".join(setup.tokenizer.decode([token]).replace("\n", "\\n") for token, _ in run)
        console.say(
            f"  {'learnt' if learnt else 'given '}  {printable(text, left)}", style="green" if learnt else "dim"
        )
        left -= len(text)
        if left <= 0:
            break


def _target(setup: Setup) -> str:
    """What the first sample has to give as a whole."""
    targets, labels = setup.prepared.train.targets, setup.prepared.report.labels
    if targets is None or task_of(setup.request.recipe) not in ("SEQ_CLS", "QUESTION_ANS"):
        return ""
    return f" -> {printable(labels[targets[0, 0]])}" if labels else f" -> tokens {targets[0, 0]} to {targets[0, 1]}"


def show_result(recipe: Recipe, result: RunResult) -> None:
    """What came out, and what to type next."""
    rows: list[tuple[str, Any]] = [("steps", f"{result.steps} in {console.duration(result.seconds)}")]
    if result.stopped:
        rows.append(("stopped", result.stopped))
    if result.metrics:
        rows += [(f"step {result.step}", ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items()))]
    rows += [
        (
            "speed",
            f"{result.tokens / max(result.seconds, 1e-9):,.0f} tokens/s, peak memory {console.size(result.memory)}",
        ),
        ("model" if recipe.adapter.method == FULL else "adapter", console.path(result.folder)),
        ("verified", result.verified),
        ("losses", console.path(result.plot) if result.plot else None),
    ]
    console.say()
    console.facts("done", rows)
    folder = shlex.quote(console.path(result.folder, home=False))
    console.facts("next", [("", f"peft eval {folder}"), ("", f"peft inspect {folder}")])


def _model(setup: Setup) -> Iterator[tuple[str, str]]:
    recipe, outline = setup.request.recipe, setup.outline
    yield (
        "base",
        f"{console.path(recipe.model.name_or_path)}, {count(outline.parameters)} parameters in {outline.dtype}",
    )
    yield "adapter", method_line(recipe)
    if outline.adapted:
        yield "targets", f"{outline.adapted} modules (the base has {outline.linear} linear ones)"
    yield "trained", f"{outline.trainable:,} parameters, {outline.trainable / outline.parameters:.3%} of the base's"


def _data(setup: Setup) -> Iterator[tuple[str, str]]:
    report = setup.prepared.report
    yield "train", _part(report.train)
    if report.eval is not None:
        yield "eval", _part(report.eval)
    if report.labels:
        shown = ", ".join(printable(name, 40) for name in report.labels[:MAX_CLASSES])
        yield "classes", f"{len(report.labels)}: {shown}" + ", ..." * (len(report.labels) > MAX_CLASSES)
    if report.streamed:
        rows, at_a_time = sum(source.rows for source in report.train.sources), setup.request.recipe.data.buffer_size
        looked_at = f"these are its first {rows:,} rows, all that is looked at beforehand"
        yield "stream", f"{looked_at}; {at_a_time:,} at a time are read while training"
    yield "lengths", ", ".join(f"to {edge}: {number:,}" for edge, number in report.train.lengths.items())
    for source in report.train.sources:
        form = f"{source.format}, " + ("chat template" if source.templated else "plain text")
        if task_of(setup.request.recipe) not in ("CAUSAL_LM", "preference"):
            form = source.format
        yield "from", f"{console.path(source.path)} ({form}, {source.rows:,} rows)"
    if setup.prepared.cache:
        said, _, where = setup.prepared.cache.rpartition(" ")
        yield "cache", f"{said} {console.path(where)}"


def _part(part: PartReport) -> str:
    learnt = f", {part.supervised_tokens:,} learnt ({part.supervised_tokens / part.tokens:.0%})"
    truncated = sum(source.truncated for source in part.sources)
    return (
        f"{part.samples:,} samples, {part.tokens:,} tokens{learnt if part.supervised_tokens else ''}, "
        f"longest {part.longest:,}" + (f", {truncated:,} truncated" if truncated else "")
    )


def _plan(setup: Setup) -> Iterator[tuple[str, str]]:
    training, data = setup.request.recipe.training, setup.request.recipe.data
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    packed = f", rows of {data.max_length} tokens packed by {data.packing}" if data.packing != "none" else ""
    launcher = setup.request.recipe.launcher
    machines = f" on {launcher.num_machines} machines, this is {launcher.machine_rank}" * (launcher.num_machines > 1)
    yield "batch", f"{batch} x {accumulation} accumulated x {setup.processes} processes{machines}{packed}"
    warmup = warmup_steps(training, setup.steps)
    yield "steps", f"{setup.steps:,}, {warmup:,} of them to warm up"
    yield "rate", f"{training.learning_rate:g}, {training.lr_scheduler_type}, {training.optim}"
    kept = "all kept" if training.save_total_limit is None else f"{training.save_total_limit} kept"
    yield "save", _when(training.save_strategy, training.save_steps) + f", {kept}"
    evaluated = _when(training.eval_strategy, training.eval_steps)
    yield "evaluate", evaluated if setup.prepared.eval is not None else "never: data.eval is not set"
    yield "output", console.path(training.output_dir)
    if setup.command is not None:
        assignments = [f"{name}={value}" for name, value in setup.command.environment.items()]
        yield "command", shlex.join([*assignments, *setup.command.argv])


def _show_memory(plan: MemoryPlan | None) -> None:
    if plan is None:
        console.facts("memory", [("not known", "this model can't be followed without data")])
        return
    rows = [(name, console.size(size)) for name, size in plan.rows()]
    console.facts(f"memory on {plan.device}", [*rows, ("available", console.size(plan.available))])
    if moved := [(name, console.size(size)) for name, size in plan.offloaded_rows()]:
        available = console.size(plan.available_main or 0)
        console.facts("main memory", [*moved, ("available", available)])
    if not plan.fits:
        console.say(
            "  note  this may not fit: lower per_device_train_batch_size or data.max_length, or set gradient_checkpointing",
            style="yellow",
        )


def _when(strategy: str, steps: int) -> str:
    return {"no": "at the end", "epoch": "every epoch"}.get(strategy, f"every {steps} steps")


def count(number: int) -> str:
    """A number of parameters as people say it: `135M`."""
    return console.size(number).replace(" ", "").removesuffix("B").replace("G", "B").replace("k", "K")
