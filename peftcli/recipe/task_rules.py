"""What fits a task: which formats its data has, what decides the best checkpoint, what can't be combined with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

from peftcli.data.formats import TASK_FORMATS

if TYPE_CHECKING:
    from peftcli.recipe.schema import Recipe

TASK_METRICS: dict[str, tuple[str, ...]] = {
    "CAUSAL_LM": ("eval_loss", "eval_token_accuracy"),
    "preference": ("eval_loss", "eval_accuracy", "eval_margin"),
    "SEQ_2_SEQ_LM": ("eval_loss", "eval_token_accuracy"),
    "SEQ_CLS": ("eval_loss", "eval_accuracy", "eval_macro_f1"),
    "TOKEN_CLS": ("eval_loss", "eval_token_accuracy", "eval_span_f1"),
    "QUESTION_ANS": ("eval_loss", "eval_window_exact_match", "eval_window_f1"),
    "FEATURE_EXTRACTION": ("eval_loss", "eval_accuracy"),
}
"""What the evaluation of each task gives; of `eval_loss` less is better, of the others more."""


def higher_is_better(metric: str) -> bool:
    """Which way a `metric_for_best_model` is good."""
    return metric != "eval_loss"


WITH_CLASSES = ("SEQ_CLS", "TOKEN_CLS")
SPLITTABLE = ("CAUSAL_LM", "QUESTION_ANS")
"""Tasks of whose samples a part is a sample."""


def task_of(recipe: Recipe) -> str:
    """The recipe's task, a key of the tables: its task type, or `preference`."""
    return recipe.model.task_type if recipe.preference is None else "preference"


def check_task(recipe: Recipe) -> None:
    """Raises:
    PydanticCustomError: something does not go with the task.
    """
    task = task_of(recipe)
    for field, named in _formats(recipe):
        if named != "auto" and named not in TASK_FORMATS[task]:
            raise contradiction(
                f"{field} is `{named}`, which is no data for {task}.",
                fix=f"choose one of {', '.join(TASK_FORMATS[task])}, or {_for_format(named)}",
            )
    if (metric := recipe.training.metric_for_best_model) not in TASK_METRICS[task]:
        raise contradiction(
            f"training.metric_for_best_model is `{metric}`, which the evaluation of {task} does not give.",
            fix=f"choose one of {', '.join(TASK_METRICS[task])}",
        )
    if recipe.model.labels is not None and task not in WITH_CLASSES:
        raise contradiction(f"model.labels names classes, and {task} has none.", fix="leave model.labels out")
    if recipe.data.overflow == "split" and task not in SPLITTABLE:
        raise contradiction(
            f"data.overflow is `split`, but a part of a {task} sample is no sample.",
            fix="choose error, drop or truncate",
        )
    if recipe.data.packing != "none" and task != "CAUSAL_LM":
        raise contradiction(f"data.packing is for CAUSAL_LM, not for {task}.", fix="leave data.packing out")
    start = getattr(recipe.adapter.config, "init_lora_weights", None)
    if start in ("eva", "corda", "lora_ga") and task != "CAUSAL_LM":
        raise contradiction(
            f"A start by {start} is for CAUSAL_LM, not for {task}.", fix="choose another adapter.init_lora_weights"
        )
    if recipe.preference is not None:
        _check_preference(recipe)
    if recipe.data.streaming:
        _check_stream(recipe)
    elif recipe.data.buffer_size != type(recipe.data).model_fields["buffer_size"].default:
        raise contradiction("data.buffer_size is for data.streaming.", fix="set data.streaming, or leave it out")


def _check_stream(recipe: Recipe) -> None:
    """What has to be known of data beforehand is not known of a stream."""
    data, training = recipe.data, recipe.training
    if training.max_steps < 0:
        raise contradiction(
            "data.streaming needs training.max_steps: how many steps an epoch has is not known beforehand.",
            fix="set training.max_steps",
        )
    if data.eval is not None and not isinstance(data.eval, tuple):
        raise contradiction(
            "data.eval asks for a part of a stream, of which nothing can be held out.",
            fix="name a file of its own in data.eval",
        )
    for name in ("eval_strategy", "save_strategy"):
        if getattr(training, name) == "epoch":
            raise contradiction(f"training.{name} is `epoch`, which a stream has no end of.", fix="choose steps or no")
    if task_of(recipe) in WITH_CLASSES and recipe.model.labels is None:
        raise contradiction(
            "model.labels is not set, and the classes of a stream are not known beforehand.",
            fix="name them in model.labels",
        )


def _check_preference(recipe: Recipe) -> None:
    assert recipe.preference is not None
    if recipe.model.task_type != "CAUSAL_LM":
        raise contradiction("preference needs model.task_type CAUSAL_LM.", fix="leave preference or the task type out")
    if recipe.preference.loss == "dpo" and recipe.adapter.config is None:
        raise contradiction(
            "DPO compares with the base, which is the model with its adapter switched off; `full` has no adapter.",
            fix="choose an adapter.method, or preference.loss: orpo, which compares with nothing",
        )
    if recipe.preference.loss == "orpo" and recipe.preference.label_smoothing:
        raise contradiction("preference.label_smoothing is DPO's.", fix="leave it out")


def _formats(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "data.format", recipe.data.format
    for part in ("train", "eval"):
        sources = getattr(recipe.data, part)
        for index, source in enumerate(sources if isinstance(sources, tuple) else ()):
            yield f"data.{part}[{index}].format", source.format or "auto"


def _for_format(name: str) -> str:
    task = next(task for task, formats in TASK_FORMATS.items() if name in formats)
    return "add a preference section" if task == "preference" else f"set model.task_type to {task}"


def contradiction(problem: str, fix: str) -> PydanticCustomError:
    """An error about fields that do not fit together."""
    return PydanticCustomError("contradiction", "{problem}", {"problem": problem, "fix": fix})
