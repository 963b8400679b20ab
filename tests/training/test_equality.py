"""One process with batches of 4 and two with batches of 2, under each strategy: the same losses, the same adapter.

The table is README's. ZeRO-3 has its own test, in test_deepspeed.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from peftcli.training import worker
from training.side_by_side import DDP, FSDP, LORA, Launcher, Row, assert_equal, run_in_two, save_bases

STRATEGIES: dict[str, Launcher] = {
    "ddp": DDP,
    "zero1": {"type": "deepspeed", "num_processes": 2, "config": "zero1"},
    "zero2": {"type": "deepspeed", "num_processes": 2, "config": "zero2"},
    "fsdp": FSDP,
}
ADALORA = {"method": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1}
ROWS = {
    "lora": Row({**LORA, "target_modules": "all-linear"}, training={"gradient_accumulation_steps": 2}),
    "dora": Row({**LORA, "use_dora": True}),
    "adalora": Row({**ADALORA, "target_modules": ["q_proj"]}),
    "ia3": Row({"method": "ia3"}),
    "loha": Row({"method": "loha", "r": 4, "target_modules": ["q_proj"]}),
    "vera": Row({"method": "vera", "r": 4, "target_modules": ["q_proj"]}),
    "prompt_tuning": Row({"method": "prompt_tuning", "num_virtual_tokens": 4}),
    "modules_to_save": Row({**LORA, "modules_to_save": ["lm_head"]}),
}


def cases(*, slow: bool) -> list[tuple[str, str]]:
    """Row and strategy. ZeRO-1 is ZeRO-2 with whole gradients: CI runs it for LoRA only."""
    table = [(row, strategy) for row in ROWS for strategy in STRATEGIES]
    return [case for case in table if (case[1] == "zero1" and case[0] != "lora") == slow]


def run_cases(folder: Path, bases: dict[str, Path], table: list[tuple[str, str]]) -> None:
    """Every case in one pair of processes; what each row comes to alone in this one."""
    for name, strategy in table:
        row = ROWS[name]
        row.prepare(folder / f"{name}-{strategy}", bases[row.base], STRATEGIES[strategy])
    run_in_two(folder, [(f"{name}-{strategy}", None) for name, strategy in table])
    for name in dict.fromkeys(name for name, _ in table):
        row = ROWS[name]
        row.prepare_alone(folder / name, bases[row.base])
        worker.run(folder / name)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("fast")
    installed = find_spec("deepspeed") is not None
    run_cases(folder, bases, [case for case in cases(slow=False) if installed or not case[1].startswith("zero")])
    yield folder


@pytest.mark.filterwarnings("default::UserWarning")  # what a method says of its settings is tested elsewhere
@pytest.mark.parametrize(("name", "strategy"), cases(slow=False))
def test_equals_one_process(name: str, strategy: str, fast: Path) -> None:
    if not (fast / f"{name}-{strategy}").exists():
        pytest.skip("needs the package deepspeed")
    assert_equal(fast / name, fast / f"{name}-{strategy}")


@pytest.mark.slow
@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the package deepspeed")
def test_the_rest_of_the_table(bases: dict[str, Path], tmp_path: Path) -> None:
    run_cases(tmp_path, bases, cases(slow=True))
    for name, strategy in cases(slow=True):
        assert_equal(tmp_path / name, tmp_path / f"{name}-{strategy}")
