"""`peft eval`: a base and its adapters side by side on held-out data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.cli import console, eval_screens
from peftcli.cli import eval_options as options
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
    adapters: options.Adapters,
    data: options.Data = None,
    metrics: options.Metrics = None,
    regex: options.Regex = None,
    tasks: options.Tasks = None,
    apply_chat_template: options.ApplyChatTemplate = False,
    generate: options.Generate = False,
    base: options.Base = None,
    output: options.Output = None,
    report: options.Report = None,
    fail_under: options.FailUnder = None,
    format: options.Format = None,
    max_samples: options.MaxSamples = None,
    max_new_tokens: options.MaxNewTokens = None,
    batch_size: options.BatchSize = 32,
) -> int:
    """Compare a base model with its adapters, all in one run on the same samples.

    The base is loaded once; rows of several adapters share a batch where their
    methods allow it. A full fine-tuning (method: full) is loaded beside the base.
    Each difference from the base is shown with its standard error and p, how often
    chance alone would make one as large: by an exact sign test where answers are
    right or wrong, by a paired t test elsewhere.

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
    from peftcli.evaluation.panel import gather

    _require_usable(tasks, output, report)
    panel = gather(adapters, base)
    wanted, thresholds = _wanted(panel, metrics, regex, tasks, fail_under or [])
    console.note(f"base {panel.base}")
    _say_whole_models(panel)
    asked = Options(data, format, generate, max_samples, max_new_tokens, batch_size, apply_chat_template)
    comparison, samples = _compare(panel, wanted, _names(tasks), asked)
    results = _results(panel, comparison, data, samples)
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


def _require_usable(tasks: str | None, output: Path | None, report: Path | None) -> None:
    """What can be told before anything is loaded.

    Raises:
        InputError: lm-evaluation-harness is not installed, or results can't be written where they should be.
    """
    if tasks is not None:
        from peftcli.evaluation.harness import require_harness

        require_harness()
    if output is not None and not output.parent.is_dir():
        raise InputError("there is no such folder", place=output.parent, field="--output")
    if report is not None:
        from peftcli.report.folder import require_usable

        require_usable(report)


def _wanted(
    panel: Panel, metrics: str | None, regex: str | None, tasks: str | None, fail_under: list[str]
) -> tuple[dict[str, Metric], dict[str, float]]:
    """Metrics by name, those of the task unless others were asked for, and thresholds.

    Raises:
        InputError: an unknown name, a threshold without a number, or the harness's tasks for no language model.
    """
    from peftcli.evaluation.metrics import default_metrics

    if tasks is not None and panel.task not in ("CAUSAL_LM", "preference"):
        raise InputError(f"the harness asks language models, not one of {panel.task}", field="--tasks")
    listed = metrics if metrics is not None or tasks is not None else default_metrics(panel.task)
    return _metrics(_names(listed), regex, fail_under)


def _results(panel: Panel, comparison: Comparison, data: str | None, samples: int) -> dict[str, Any]:
    """What `--output` and reports hold."""
    return {
        "base": panel.base,
        "adapters": {column: str(subject.adapter) for column, subject in panel.subjects.items()},
        "data": (data or "held out by the run") if samples else None,
        "samples": samples,
        **comparison.to_dict(),
    }


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


def _compare(panel: Panel, metrics: dict[str, Metric], tasks: list[str], asked: Options) -> tuple[Comparison, int]:
    """What came out, and over how many samples of data (none, if there are only tasks)."""
    from peftcli.evaluation.compare import compare
    from peftcli.evaluation.comparison import Comparison

    tokenizer = panel.first.tokenizer()
    samples = _samples(panel, tokenizer, asked) if metrics or asked.generate or not tasks else None
    loaded = _load_tasks(tasks, tokenizer, asked)
    bench = panel.bench()
    comparison = Comparison(bench.columns[1:], [], [])
    with _progress() as progress:
        if samples is not None:
            comparison = compare(
                bench,
                tokenizer,
                samples,
                metrics,
                judge=panel.judge(samples, tokenizer, asked.batch_size),
                generated=asked.generate,
                max_new_tokens=asked.max_new_tokens,
                batch_size=asked.batch_size,
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
                    apply_chat_template=asked.apply_chat_template,
                    max_samples=asked.max_samples,
                    batch_size=asked.batch_size,
                    progress=progress,
                )
            )
    for note in comparison.notes:
        console.note(note)
    return comparison, len(samples) if samples is not None else 0


def _samples(panel: Panel, tokenizer: Any, asked: Options) -> TokenDataset:
    samples, warnings = panel.data(tokenizer, asked.data, format=asked.format, max_samples=asked.max_samples)
    for warning in warnings:
        console.note(f"warning: {warning}")
    return samples


def _load_tasks(names: list[str], tokenizer: Any, asked: Options) -> dict[str, Any]:
    """The harness's tasks, and a word on the form they are asked in."""
    if not names:
        return {}
    from peftcli.evaluation.harness import load_tasks

    if tokenizer.chat_template and not asked.apply_chat_template:
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
