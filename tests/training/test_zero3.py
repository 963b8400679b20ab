"""ZeRO-3 with every method and every task, in two real processes, against one process."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from tasks import TASKS
from torch import nn

from peftcli.errors import InputError
from peftcli.training import worker
from training.run_folders import save_base
from training.side_by_side import DDP, FSDP, Launcher, Row, assert_equal, run_in_two
from training.task_runs import prepare_halves, run_alone
from training.test_methods import RECIPES, adapter_of

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the package deepspeed")

ZERO3: Launcher = {"type": "deepspeed", "num_processes": 2, "config": "zero3"}

BY_PROCESS = ("corda", "eva", "lily", "lora-ga", "monteclora", "poly", "pvera", "velora")
"""Methods that draw, drop or start by what a process gets of the data: two processes are compared with two (DDP)."""


@pytest.mark.slow
@pytest.mark.filterwarnings("default::UserWarning")
def test_every_method_equals_one_process(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    for name in RECIPES:
        Row(adapter_of(name)).prepare(tmp_path / name, base, ZERO3)
        if name in BY_PROCESS:
            Row(adapter_of(name)).prepare(tmp_path / f"{name}-judge", base, DDP)
        else:
            Row(adapter_of(name)).prepare_alone(tmp_path / f"{name}-judge", base)
            worker.run(tmp_path / f"{name}-judge")
    run_in_two(tmp_path, [(name, None) for name in (*RECIPES, *(f"{name}-judge" for name in BY_PROCESS))], timeout=1500)
    for name in RECIPES:
        assert_equal(tmp_path / f"{name}-judge", tmp_path / name)


@pytest.mark.slow
def test_every_task_equals_one_process(tmp_path: Path) -> None:
    """Pairs are compared with FSDP and DDP: what they are told from depends on the batch."""
    alone = {task: run_alone(task, tmp_path / task) for task in TASKS}
    launchers = {"zero3": ZERO3, "fsdp": FSDP, "ddp": DDP}
    runs = [(task, name) for task in TASKS for name in launchers if name == "zero3" or task == "FEATURE_EXTRACTION"]
    for task, name in runs:
        prepare_halves(alone[task], tmp_path / f"{task}-{name}", launchers[name])
    run_in_two(tmp_path, [(f"{task}-{name}", None) for task, name in runs])
    for task in TASKS:
        pairs = task == "FEATURE_EXTRACTION"
        for judge in (tmp_path / f"{task}-fsdp", tmp_path / f"{task}-ddp") if pairs else (alone[task],):
            assert_equal(judge, tmp_path / f"{task}-zero3")


def test_experts_that_are_modules_of_their_own_are_refused() -> None:
    from peftcli.training.strategies.zero3 import require_fused_experts

    model = nn.Module()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(nn.Linear(4, 12).weight.view(3, 4, 4))
    require_fused_experts(model)
    model.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    with pytest.raises(InputError, match="experts: are modules of their own"):
        require_fused_experts(model)
