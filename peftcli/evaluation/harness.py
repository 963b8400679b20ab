"""lm-evaluation-harness on our own models: its tasks, or rows of a JSONL file made into one. The optional extra `eval`.

The harness gets the model as an object: base, and base with adapter, each as it stands in memory. It would tie input and
output embeddings once more, which would overwrite a head that an adapter trained; here it can't.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peftcli.data.readers import read_file
from peftcli.errors import InputError, nearest, printable
from peftcli.evaluation import texts
from peftcli.evaluation.bench import BASE_COLUMN, Bench
from peftcli.evaluation.compare import MIN_EXTRA_TOKENS, Progress
from peftcli.evaluation.comparison import Row
from peftcli.evaluation.estimates import Estimate, mean
from peftcli.lazy import numpy as np

JSON_LINES = (".jsonl", ".json")
YAML = (".yaml", ".yml")
GENERATION, CHOICE = {"prompt", "completion"}, {"prompt", "choices", "answer"}
"""Columns of a JSONL task: a text to be written, or the right one of several (its index, or itself)."""

Samples = dict[str, dict[str, list[float]]]
"""By task, then by metric and filter: each document's own value."""


def require_harness() -> None:
    """Raises:
    InputError: it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise InputError(
            "tasks are those of lm-evaluation-harness, which is not installed",
            field="--tasks",
            fix="pip install 'peftcli[eval]'",
        )


def load_tasks(names: Sequence[str], tokenizer: Any) -> dict[str, Any]:
    """The harness's task objects by name.

    Args:
        names: tasks the harness knows, its YAML files, or JSONL files with the columns of `GENERATION` or `CHOICE`.
        tokenizer: says how long an expected answer is.

    Raises:
        InputError: a task that is not known, or a file that can't be used.
    """
    from lm_eval.tasks import TaskManager

    _quiet()
    manager = TaskManager()
    found: dict[str, Any] = {}
    for name in names:
        path = Path(name)
        wanted: Any = name
        if path.suffix in JSON_LINES:
            wanted = _jsonl_task(path, tokenizer)
        elif path.suffix in YAML and not path.is_file():
            raise InputError("there is no such file", place=path, field="--tasks")
        elif path.suffix not in YAML and not manager.match_tasks([name]):
            close = str(nearest(name, manager.all_tasks))
            raise InputError(f"{printable(repr(name))} is no task", field="--tasks", fix=close or "lm-eval ls tasks")
        try:
            found |= manager.load([wanted])["tasks"]
        except Exception as error:  # data that can't be fetched, YAML that does not parse: each in its own way
            raise InputError(f"can't be loaded: {printable(error, 500)}", place=name, field="--tasks") from error
    return found


def compare_tasks(
    bench: Bench,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    *,
    apply_chat_template: bool = False,
    max_samples: int | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[Row]:
    """Base and adapters on tasks, one after another, paired document by document.

    Args:
        bench: base and adapters.
        tokenizer: the base's.
        tasks: from `load_tasks`.
        apply_chat_template: ask in the form of the tokenizer's chat template.
        max_samples: documents of each task at most.
        batch_size: requests at a time.
        progress: told which model is at work.

    Raises:
        InputError: the harness can't run a task on this model.
    """
    values: dict[str, dict[str, dict[str, float]]] = {}
    samples: dict[str, Samples] = {}
    better: dict[str, dict[str, bool]] = {}
    for number, turn in enumerate(bench.one_by_one()):
        [column] = turn.columns
        if progress is not None:
            progress("tasks", number, len(bench.columns))
        found = _evaluate(
            turn.model,
            tokenizer,
            tasks,
            apply_chat_template=apply_chat_template,
            limit=max_samples,
            batch_size=batch_size,
        )
        values[column], samples[column] = found["results"], _by_metric(found["samples"])
        better |= found["higher_is_better"]
    return list(_rows(bench.columns, values, samples, better))


def _evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    *,
    apply_chat_template: bool,
    limit: int | None,
    batch_size: int,
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    silent = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())  # its bars are for terminals
    with _never_tied(model), silent:
        language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        try:
            return simple_evaluate(
                language_model,
                tasks=list(tasks.values()),
                limit=limit,
                apply_chat_template=apply_chat_template,
                bootstrap_iters=0,  # errors are ours, from the documents' own values
                log_samples=True,
            )
        except (ValueError, KeyError, ImportError, NotImplementedError) as error:
            raise InputError(f"the harness can't run: {printable(error, 500)}", field="--tasks") from error


@contextmanager
def _never_tied(model: Any) -> Iterator[None]:
    """While open, nothing ties the model's embeddings: what is trained stays what it is."""
    vars(model)["tie_weights"] = lambda *arguments, **options: None
    try:
        yield
    finally:
        del vars(model)["tie_weights"]


def _by_metric(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Samples:
    found: Samples = {}
    for task, documents in samples.items():
        for document in sorted(documents, key=lambda one: one["doc_id"]):
            for metric in document["metrics"]:
                values = found.setdefault(task, {}).setdefault(f"{metric},{document['filter']}", [])
                values.append(document[metric])
    return found


def _rows(
    columns: Sequence[str],
    values: Mapping[str, Mapping[str, Mapping[str, Any]]],
    samples: Mapping[str, Samples],
    better: Mapping[str, Mapping[str, bool]],
) -> Iterator[Row]:
    """A row for each task's metric, named `task:metric`, with the filter behind it where there is one."""
    for task, metrics in values[BASE_COLUMN].items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not isinstance(value, (int, float)) or not chosen or metric.endswith("_stderr"):
                continue
            name = f"{task}:{metric}" + ("" if chosen == "none" else f",{chosen}")
            found = {
                column: _estimate(values[column][task][key], samples[column].get(task, {}).get(key, []))
                for column in columns
            }
            base = found.pop(BASE_COLUMN)
            count = len(samples[BASE_COLUMN].get(task, {}).get(key, []))
            yield Row(name, better.get(task, {}).get(metric, True), count, base, found)


def _estimate(value: float, documents: Sequence[Any]) -> Estimate:
    """With an error where the metric is the mean of its documents' values; else the value alone."""
    if len(documents) and all(isinstance(one, (int, float)) for one in documents):
        estimate = mean([float(one) for one in documents])
        if abs(estimate.value - value) <= 1e-6 * max(1.0, abs(value)):
            return estimate
    return Estimate(float(value), np.zeros(1))


# -- tasks from JSONL -----------------------------------------------------------------------------------------------


def _jsonl_task(path: Path, tokenizer: Any) -> dict[str, Any]:
    """The harness's description of a file's rows as a task."""
    rows = list(read_file(path))
    if not rows:
        raise InputError("is empty: it has no rows", place=path, field="--tasks")
    columns = next((columns for columns in (CHOICE, GENERATION) if columns <= set(rows[0].values)), None)
    if columns is None:
        raise InputError(
            "is no task",
            place=rows[0].place,
            field="--tasks",
            allowed="columns prompt, completion; or prompt, choices, answer",
        )
    documents = [_document(row.values, row.place, columns) for row in rows]
    task = {
        "task": path.stem,
        "custom_dataset": partial(_dataset, documents),
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
    }
    if columns is CHOICE:
        return task | {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
    longest = max(len(tokenizer(one["completion"], add_special_tokens=False).input_ids) for one in documents)
    limit = longest + 1 + MIN_EXTRA_TOKENS  # as `compare` has it, with the token that ends an answer
    return task | {
        "output_type": "generate_until",
        "doc_to_target": "{{completion}}",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": limit},
        "process_results": _score,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in SCORES],
    }


SCORES = {"exact_match": texts.exact_match, "contains": texts.contains, "rouge_l": texts.rouge_l}


def _score(document: Mapping[str, Any], written: Sequence[str]) -> dict[str, float]:
    return {name: score(written[0], document["completion"]) for name, score in SCORES.items()}


def _document(values: Mapping[str, Any], place: str, columns: set[str]) -> dict[str, Any]:
    """The columns a task needs, checked.

    Raises:
        InputError: naming the row.
    """
    for name in sorted(columns - {"choices", "answer"}):
        if not isinstance(values.get(name), str):
            raise InputError("is not a text", place=place, field=name)
    if columns is GENERATION:
        return {name: values[name] for name in ("prompt", "completion")}
    choices, answer = values.get("choices"), values.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) for one in choices):
        raise InputError("is not a list of two texts or more", place=place, field="choices")
    index = choices.index(answer) if answer in choices else answer
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
        raise InputError("is none of the choices, nor the number of one (from 0)", place=place, field="answer")
    return {"prompt": values["prompt"], "choices": choices, "answer": index}


def _dataset(documents: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(documents)}


def _quiet() -> None:
    """The harness speaks of every step; only its errors are shown."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
