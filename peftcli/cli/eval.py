"""`peft eval`: a base and its adapters side by side on held-out data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftcli.cli import console, eval_screens
from peftcli.errors import EXIT_FAILURE, InputError, printable

if TYPE_CHECKING:
    from peftcli.data.tokens import TokenDataset
    from peftcli.evaluation.compare import Progress
    from peftcli.evaluation.comparison import Comparison
    from peftcli.evaluation.metrics import Metric
    from peftcli.evaluation.panel import Panel


@dataclass(frozen=True)
class Options:
    """What was asked for, beside adapters and metrics; named as on the command line."""

    data: str | None
    format: str | None
    generate: bool
    max_samples: int | None
    max_new_tokens: int | None
    batch_size: int
    apply_chat_template: bool


def command(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER|RECIPE...", help="Adapter or run folders, trained recipes, or hub ids."),
    ],
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Data to evaluate on; by default what the run held out.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Metrics, separated by commas; by default those of the task: loss,perplexity for a language model.",
        ),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Adds the metric regex: the pattern is in the answer and, if it has a group, the group holds what it "
            "holds in the expected answer.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Tasks of lm-evaluation-harness (the extra `eval`), separated by commas: names it knows, its "
            "YAML files (code beside them may run), or JSONL files with prompt and completion, or prompt, choices and "
            "answer.",
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask tasks in the form of the tokenizer's chat template.")
    ] = False,
    generate: Annotated[bool, typer.Option("--generate", help="Show generated answers, whatever the metrics.")] = False,
    base: Annotated[str | None, typer.Option(help="Base to use instead of the one the adapter was trained on.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write everything as JSON.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write report.html, report.md with pictures, and results.json."),
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Exit with 1 if an adapter is worse than this; may be given again."),
    ] = None,
    format: Annotated[str | None, typer.Option(help="Format of FILE, if not that of the training data.")] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Evaluate on at most this many samples.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest generated answer; by default a little over the longest expected.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch, all adapters together.")] = 32,
) -> int:
    """Compare a base model with its adapters, all in one run on the same samples.

    The base is loaded once; rows of several adapters share a batch where their
    methods allow it. A full fine-tuning (method: full) is loaded beside the base. Each difference from the base is shown with its standard
    error and p, how often chance alone would make one as large: by an exact sign
    test where answers are right or wrong, by a paired t test elsewhere.

    Metrics of tokens: loss, perplexity, token_accuracy.
    Of generated answers: exact_match, contains, regex, rouge_l, f1, qa_em, qa_f1,
    stop_rate, repetition.
    Of answers that are names of classes: accuracy, macro_f1.
    Of other tasks: SEQ_CLS accuracy, macro_f1; TOKEN_CLS token_accuracy, span_f1;
    QUESTION_ANS qa_em, qa_f1; pairs and preferences accuracy.

    peft eval out/sql

    peft eval out/lora out/dora --data test.jsonl --metrics loss,exact_match,rouge_l --report out/report

    peft eval out/sql --data test.jsonl --fail-under exact_match=0.6

    peft eval out/sql --tasks arc_easy,my_task.jsonl --max-samples 200
    """
    from peftcli.evaluation.metrics import default_metrics
    from peftcli.evaluation.panel import gather

    if tasks is not None:
        from peftcli.evaluation.harness import require_harness

        require_harness()
    if output is not None and not output.parent.is_dir():
        raise InputError("there is no such folder", place=output.parent, field="--output")
    if report is not None:
        from peftcli.report.folder import require_usable

        require_usable(report)
    panel = gather(adapters, base)
    if tasks is not None and panel.task not in ("CAUSAL_LM", "preference"):
        raise InputError(f"the harness asks language models, not one of {panel.task}", field="--tasks")
    listed = metrics if metrics is not None or tasks is not None else default_metrics(panel.task)
    wanted, thresholds = _metrics(_names(listed), regex, fail_under or [])
    console.note(f"base {panel.base}")
    _say_whole_models(panel)
    options = Options(data, format, generate, max_samples, max_new_tokens, batch_size, apply_chat_template)
    comparison, samples = _compare(panel, wanted, _names(tasks), options)
    results = {
        "base": panel.base,
        "adapters": {column: str(subject.adapter) for column, subject in panel.subjects.items()},
        "data": (data or "held out by the run") if samples else None,
        "samples": samples,
        **comparison.to_dict(),
    }
    if output is not None:
        from peftcli.report.folder import write_json

        write_json(output, results)
    eval_screens.show(comparison)
    if report is not None:
        from peftcli.report.evaluation import write_report

        console.say(f"report  {write_report(report, comparison, results, wanted)}")
    missed = comparison.missed(thresholds)
    for sentence in missed:
        console.fail(sentence)
    return EXIT_FAILURE if missed else 0


def _say_whole_models(panel: Panel) -> None:
    """What needs memory beside the base, before anything is loaded."""
    for column, subject in panel.subjects.items():
        if subject.is_whole:
            size = console.size(sum(file.stat().st_size for file in Path(subject.adapter).glob("*.safetensors")))
            console.note(f"{column} was trained in full: in its turn {size} are in memory beside the base")


def _names(listed: str | None) -> list[str]:
    return [name.strip() for name in listed.split(",")] if listed is not None else []


def _metrics(
    listed: list[str], pattern: str | None, fail_under: list[str]
) -> tuple[dict[str, Metric], dict[str, float]]:
    """Metrics and thresholds by name; a metric that only has a threshold is computed, too."""
    from peftcli.evaluation.metrics import REGEX, find, known_metrics

    known = known_metrics(pattern)
    thresholds = dict(_threshold(text, known) for text in fail_under)
    names = [*listed, *([REGEX] if pattern is not None else []), *thresholds]
    return {name: find(name, "--metrics", known) for name in names}, thresholds


def _threshold(text: str, known: dict[str, Metric]) -> tuple[str, float]:
    """`exact_match=0.6` taken apart."""
    from peftcli.evaluation.metrics import find

    name, _, number = text.partition("=")
    find(name, "--fail-under", known)
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{printable(repr(text))} names no number", field="--fail-under", allowed="exact_match=0.6")
    return name, value


def _compare(panel: Panel, metrics: dict[str, Metric], tasks: list[str], options: Options) -> tuple[Comparison, int]:
    """What came out, and over how many samples of data (none, if there are only tasks)."""
    from peftcli.evaluation.compare import compare
    from peftcli.evaluation.comparison import Comparison

    tokenizer = panel.first.tokenizer()
    samples = _samples(panel, tokenizer, options) if metrics or options.generate or not tasks else None
    loaded = _load_tasks(tasks, tokenizer, options)
    bench = panel.bench()
    comparison = Comparison(bench.columns[1:], [], [])
    with _progress() as progress:
        if samples is not None:
            comparison = compare(
                bench,
                tokenizer,
                samples,
                metrics,
                judge=panel.judge(samples, tokenizer, options.batch_size),
                generated=options.generate,
                max_new_tokens=options.max_new_tokens,
                batch_size=options.batch_size,
                bf16=panel.bf16,
                progress=progress,
            )
        if loaded:
            from peftcli.evaluation.harness import compare_tasks

            comparison.rows.extend(
                compare_tasks(
                    bench,
                    tokenizer,
                    loaded,
                    apply_chat_template=options.apply_chat_template,
                    max_samples=options.max_samples,
                    batch_size=options.batch_size,
                    progress=progress,
                )
            )
    for note in comparison.notes:
        console.note(note)
    return comparison, len(samples) if samples is not None else 0


def _samples(panel: Panel, tokenizer: Any, options: Options) -> TokenDataset:
    samples, warnings = panel.data(tokenizer, options.data, format=options.format, max_samples=options.max_samples)
    for warning in warnings:
        console.note(f"warning: {warning}")
    return samples


def _load_tasks(names: list[str], tokenizer: Any, options: Options) -> dict[str, Any]:
    """The harness's tasks, and a word on the form they are asked in."""
    if not names:
        return {}
    from peftcli.evaluation.harness import load_tasks

    if tokenizer.chat_template and not options.apply_chat_template:
        console.note("tasks are asked as plain text; --apply-chat-template asks them as the model was taught to chat")
    return load_tasks(names, tokenizer)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal's stderr; silent elsewhere."""
    from rich.progress import Progress as Bar

    screen = console.err()
    with Bar(console=screen, transient=True, disable=not screen.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(printable(what), total=total)
            bar.update(tasks[what], completed=done)

        yield update
