"""How a run is spread over processes: one file a strategy, all behind the methods of `plain.Strategy`.

The loop and the worker call these methods and never ask which strategy it is.
"""

from __future__ import annotations

from pathlib import Path

from peftcli.launchers import configs
from peftcli.launchers.deepspeed import stage
from peftcli.recipe.schema import Recipe
from peftcli.training.strategies.plain import Strategy


def make_strategy(recipe: Recipe, run_folder: Path) -> Strategy:
    """Join the processes of this run's launcher.

    Args:
        recipe: its `launcher.type` says which strategy.
        run_folder: its `data/` holds the launcher file as `launchers.configs.write` resolved it.

    Raises:
        RunError: other processes came up than the recipe asks for.
    """
    config = configs.read(run_folder / "data")
    if recipe.launcher.type == "deepspeed":
        from peftcli.training.strategies.deepspeed import DeepSpeed
        from peftcli.training.strategies.zero3 import ZeRO3

        kind: type[Strategy] = ZeRO3 if stage(config) == 3 else DeepSpeed
    elif recipe.launcher.type == "fsdp":
        from peftcli.training.strategies.fsdp import FullyShardedDataParallel

        kind = FullyShardedDataParallel
    else:
        kind = Strategy
    strategy = kind(recipe.training, config, project_dir=run_folder / "trackers")
    strategy.check_processes(recipe.launcher)
    return strategy
