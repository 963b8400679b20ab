"""The options of `peft eval`, as Typer reads them from annotations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Adapters = Annotated[
    list[str],
    typer.Argument(metavar="ADAPTER|RECIPE...", help="Adapter or run folders, trained recipes, or hub ids."),
]
Data = Annotated[
    str | None, typer.Option(metavar="FILE", help="Data to evaluate on; by default what the run held out.")
]
Metrics = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Metrics, separated by commas; by default those of the task: loss,perplexity for a language model.",
    ),
]
Regex = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERN",
        help="Adds the metric regex: the pattern is in the answer and, if it has a group, the group holds what it "
        "holds in the expected answer.",
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Tasks of lm-evaluation-harness (the extra `eval`), separated by commas: names it knows, its "
        "YAML files (code beside them may run), or JSONL files with prompt and completion, or prompt, choices and "
        "answer.",
    ),
]
ApplyChatTemplate = Annotated[
    bool, typer.Option("--apply-chat-template", help="Ask tasks in the form of the tokenizer's chat template.")
]
Generate = Annotated[bool, typer.Option("--generate", help="Show generated answers, whatever the metrics.")]
Base = Annotated[str | None, typer.Option(help="Base to use instead of the one the adapter was trained on.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write everything as JSON.")]
Report = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Write report.html, report.md with pictures, and results.json."),
]
FailUnder = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Exit with 1 if an adapter is worse than this; may be given again."),
]
Format = Annotated[str | None, typer.Option(help="Format of FILE, if not that of the training data.")]
MaxSamples = Annotated[int | None, typer.Option(min=1, help="Evaluate on at most this many samples.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest generated answer; by default a little over the longest expected.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows of a batch, all adapters together.")]
