"""Run folders for every task, alone and under a launcher, with the same tokenised data."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tasks import make_run

from peftcli.cli import main
from peftcli.launchers import configs
from peftcli.recipe.load import dump_recipe, load_recipe
from peftcli.recipe.schema import Recipe
from training.side_by_side import Launcher

QUICK = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "group_by_length": False}
PLAIN = {"optim": "sgd", "learning_rate": 0.1}
"""The bias of span scores has no gradient but rounding, which Adam would make a step of."""


def run_alone(task: str, folder: Path) -> Path:
    """Train in this process with batches of 6; the run folder."""
    folder.mkdir()
    training: dict[str, Any] = {**QUICK, **(PLAIN if task == "QUESTION_ANS" else {})}
    assert main(["train", str(make_run(task, folder, **training)), "--no-audit"]) == 0
    return folder / "run"


def prepare_halves(alone: Path, folder: Path, launcher: Launcher) -> None:
    """The run of `alone` for two processes with batches of 3."""
    shutil.copytree(alone / "data", folder / "data")
    values = load_recipe(alone / "recipe.yaml", check_paths=False).model_dump(mode="json")
    values["training"] |= {"per_device_train_batch_size": 3, "output_dir": str(folder)}
    recipe = Recipe.model_validate({**values, "launcher": launcher})
    configs.write(folder / "data", configs.resolve(recipe, 2))
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
