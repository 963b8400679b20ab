"""DeepSpeed's ZeRO in two real processes over gloo: equal to one process, resumed to the bit, continued under others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from faults.nursery import make_place, outcome

from peftcli.training import worker
from training.side_by_side import (
    DDP,
    FSDP,
    LORA,
    Launcher,
    Row,
    assert_equal,
    assert_same_end,
    copy_checkpoint,
    run_in_two,
    save_bases,
)

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the package deepspeed")

ADALORA = {
    "method": "adalora",
    "init_r": 4,
    "target_r": 2,
    "tinit": 1,
    "tfinal": 1,
    "deltaT": 1,
    "target_modules": ["q_proj"],
}


def zero(config: str) -> Launcher:
    return {"type": "deepspeed", "num_processes": 2, "config": config}


LAUNCHERS = {"ddp": DDP, "fsdp": FSDP, "zero1": zero("zero1"), "zero2": zero("zero2")}
FAST = {
    "lora": Row({**LORA, "target_modules": "all-linear"}, training={"gradient_accumulation_steps": 2}),
    "adalora": Row(ADALORA),
}
DROPS = Row({**LORA, "lora_dropout": 0.2})
CONTINUED = [("zero2", "zero2"), ("zero1", "zero1"), ("zero2", "ddp"), ("fsdp", "zero2"), ("zero1", "zero2")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> Path:
    """Everything CI runs, in one pair of processes."""
    folder = tmp_path_factory.mktemp("fast")
    runs: list[tuple[str, str | None]] = []
    for name, row in FAST.items():
        for launcher in ("zero1", "zero2"):
            row.prepare(folder / f"{name}-{launcher}", bases[row.base], LAUNCHERS[launcher])
            runs.append((f"{name}-{launcher}", None))
    for launcher in LAUNCHERS:
        DROPS.prepare(folder / launcher, bases["float32"], LAUNCHERS[launcher])
        runs.append((launcher, None))
    run_in_two(folder, runs)
    resumed: list[tuple[str, str | None]] = []
    for source, target in CONTINUED:
        name = f"{source}-to-{target}"
        DROPS.prepare(folder / name, bases["float32"], LAUNCHERS[target])
        copy_checkpoint(folder / source, folder / name)
        resumed.append((name, "auto"))
    run_in_two(folder, resumed)
    return folder


@pytest.mark.parametrize("launcher", ["zero1", "zero2"])
@pytest.mark.parametrize("name", FAST)
def test_equals_one_process(name: str, launcher: str, fast: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    row = FAST[name]
    row.prepare_alone(tmp_path / "one", bases[row.base])
    worker.run(tmp_path / "one")
    assert_equal(tmp_path / "one", fast / f"{name}-{launcher}")


@pytest.mark.parametrize("launcher", ["zero1", "zero2"])
def test_resumed_to_the_bit(launcher: str, fast: Path) -> None:
    assert_same_end(fast / f"{launcher}-to-{launcher}", fast / launcher)


@pytest.mark.parametrize(("source", "target"), CONTINUED)
def test_a_checkpoint_is_continued_under_any_strategy(source: str, target: str, fast: Path) -> None:
    name = f"{source}-to-{target}"
    assert_equal(fast / source, fast / name)
    said = "adapter, step and optimizer state go on" in (fast / name / "screen.txt").read_text()
    assert said == (source != target)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_and_started_again_with_the_same_command(tmp_path: Path) -> None:
    make_place(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    arguments = ["launcher={type: deepspeed, num_processes: 2}", "training.num_train_epochs=20", "--resume", "auto"]

    def start(folder: str) -> psutil.Popen:
        command = [sys.executable, "-m", "peftcli", "train", "recipe.yaml", f"training.output_dir={folder}", *arguments]
        return psutil.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)

    whole = start("whole")
    whole.communicate(timeout=200)
    assert whole.returncode == 0
    killed = start("run")
    deadline = time.monotonic() + 200
    while not any((tmp_path / "run").glob("checkpoint-*/trainer.json")):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    for process in [*killed.children(recursive=True), killed]:
        process.kill()
    killed.communicate(timeout=100)
    assert not (tmp_path / "run/result.json").exists()
    again = start("run")
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0 and "continuing from" in said
    left, expected = (outcome(tmp_path / name) for name in ("run", "whole"))
    assert left["log"] == expected["log"]
    tensors = {name for name in expected["files"] if name.endswith(".safetensors") and not name.startswith("data")}
    assert len(tensors) >= 4 and {n: left["files"][n] for n in tensors} == {n: expected["files"][n] for n in tensors}
