"""A recipe's summary: what would be trained on what, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from peftcli.inspection.summary import options
from peftcli.recipe.load import dump_recipe, load_recipe
from peftcli.recipe.schema import DataSource, EvalSplit, Recipe


def recipe_summary(path: Path) -> dict[str, Any]:
    """The resolved recipe, and its main lines.

    Raises:
        InputErrors: naming file, line and column of everything wrong with the recipe.
    """
    recipe = load_recipe(path, check_paths=False)
    return {"kind": "recipe", "path": str(path), "lines": _lines(recipe), "recipe": yaml.safe_load(dump_recipe(recipe))}


def _lines(recipe: Recipe) -> dict[str, str]:
    model, data, training = recipe.model, recipe.data, recipe.training
    steps = f"{training.max_steps} steps" if training.max_steps > 0 else f"{training.num_train_epochs:g} epochs"
    return {
        "base": f"{model.name_or_path}, {model.task_type}, dtype {model.dtype}",
        "quantization": _quantization(recipe),
        "method": method_line(recipe),
        "data": f"{_paths(data.train)}: {data.format}, up to {data.max_length} tokens, loss on {data.loss_on}",
        "evaluation": _evaluation(recipe),
        "batch": f"{training.per_device_train_batch_size} a device x {training.gradient_accumulation_steps} accumulated",
        "training": f"{steps}, {training.optim}, {training.lr_scheduler_type} from {training.learning_rate:g}",
        "launcher": recipe.launcher.type,
        "output": str(training.output_dir),
    }


def method_line(recipe: Recipe) -> str:
    """The method, its rank, alpha and targets, and every other field that is not the default."""
    config = recipe.adapter.config
    if config is None:
        return "full: every weight is trained"
    rank = {name: getattr(config, name) for name in ("r", "lora_alpha", "target_modules") if hasattr(config, name)}
    if rank.get("target_modules", ()) is None:
        rank["target_modules"] = "the usual ones of its model type"
    fields = {**rank, **options(config)}
    return ", ".join([config.peft_type, *(f"{name} {_plain(value)}" for name, value in fields.items())])


def _plain(value: Any) -> str:
    if isinstance(value, set):
        value = sorted(value)
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _quantization(recipe: Recipe) -> str:
    section = recipe.quantization
    if section is None:
        return "none"
    return f"4 bits ({section.bnb_4bit_quant_type})" if section.load_in_4bit else "8 bits"


def _evaluation(recipe: Recipe) -> str:
    held_out = recipe.data.eval
    if held_out is None:
        return "none"
    return f"{held_out.split:.0%} of the training data" if isinstance(held_out, EvalSplit) else _paths(held_out)


def _paths(sources: tuple[DataSource, ...]) -> str:
    more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    return ", ".join(source.path for source in sources[:3]) + more
