"""A whole run from its folder, in this process and as one of its own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from peftcli.errors import InputError, RunError
from peftcli.training import worker
from peftcli.training.callbacks import read_log
from peftcli.training.checkpoints import damage
from peftcli.training.publish import RunResult
from training.run_folders import LORA, prepare_run, save_base

RESULTS = {"adapter_model.safetensors", "adapter_config.json", "README.md", "loss.png", "log.jsonl", "result.json"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "tiny")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "peftcli.training.worker", str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_quietly(folder: Path, resume: str | None = None) -> tuple[RunResult, str]:
    screen = io.StringIO()
    result = worker.run(folder, resume=resume, console=Console(file=screen, width=200))
    assert result is not None
    return result, screen.getvalue()


def test_a_run_leaves_an_adapter(tmp_path: Path, base: Path) -> None:
    folder = prepare_run(tmp_path / "run", base)
    result, screen = run_quietly(folder)
    assert {path.name for path in folder.iterdir()} >= RESULTS
    assert not list(folder.glob(".tmp-*"))
    assert result == RunResult.read(folder)
    assert (result.steps, result.verified, result.difference) == (4, "reloaded, max |dlogit| 0.0", 0.0)
    assert result.metrics is not None
    assert damage(folder / "checkpoint-4") is None
    saved = load_file(folder / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
    assert set(load_file(folder / f"checkpoint-{result.step}" / "adapter_model.safetensors")) == set(saved)
    assert [row["step"] for row in read_log(folder / "log.jsonl")] == [1, 2, 2, 3, 4, 4]
    assert screen.count("loss") == 6


def test_identical_runs_write_identical_files(tmp_path: Path, base: Path) -> None:
    files = []
    for name in "ab":
        folder = prepare_run(tmp_path / name / "run", base)
        run_quietly(folder)
        files.append([(folder / item).read_bytes() for item in ("adapter_model.safetensors", "adapter_config.json")])
        files[-1].append((folder / "README.md").read_bytes())
        files[-1].append((folder / "checkpoint-4" / "optimizer.safetensors").read_bytes())
    assert files[0] == files[1]


def test_nothing_is_written_through_links(tmp_path: Path, base: Path) -> None:
    folder = prepare_run(tmp_path / "run", base, max_steps=2)
    names = [*RESULTS, "rank-0.log", "checkpoint-2"]
    for name in names:
        victim = tmp_path / "victims" / name
        victim.parent.mkdir(exist_ok=True)
        victim.write_text("mine")
        (folder / name).symlink_to(victim)
    (tmp_path / "victims" / "log.jsonl").write_text("")
    run_quietly(folder)
    assert {(tmp_path / "victims" / name).read_text() for name in names} == {"mine", ""}
    assert not [path for path in folder.iterdir() if path.is_symlink()]
    assert damage(folder / "checkpoint-2") is None


def test_the_whole_model_as_baseline(tmp_path: Path, base: Path) -> None:
    folder = prepare_run(tmp_path / "run", base, {"method": "full"})
    result, _ = run_quietly(folder)
    assert result.difference == 0.0
    assert (folder / "model.safetensors").is_file()
    assert not (folder / "adapter_config.json").exists()


def test_damage_is_passed_over_and_said(tmp_path: Path, base: Path) -> None:
    folder = prepare_run(tmp_path / "run", base)
    run_quietly(folder)
    whole = load_file(folder / "adapter_model.safetensors")
    log = [
        {k: v for k, v in row.items() if k not in ("tokens_per_second", "memory")}
        for row in read_log(folder / "log.jsonl")
    ]
    (folder / "checkpoint-4" / "trainer.json").write_text("{}")
    _, screen = run_quietly(folder, "auto")
    assert "passed over checkpoint-4: trainer.json has 2 bytes" in screen
    assert "checkpoint-2" in screen
    again = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    rows = [
        {k: v for k, v in row.items() if k not in ("tokens_per_second", "memory")}
        for row in read_log(folder / "log.jsonl")
    ]
    assert rows == log


def test_nothing_left_to_train(tmp_path: Path, base: Path) -> None:
    folder = prepare_run(tmp_path / "run", base)
    run_quietly(folder)
    with pytest.raises(InputError, match="nothing is left to train"):
        run_quietly(folder, "auto")


def test_another_rank_is_refused_by_name(tmp_path: Path, base: Path) -> None:
    folder = prepare_run(tmp_path / "run", base)
    run_quietly(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("  r: 4\n", "  r: 8\n").replace("max_steps: 4", "max_steps: 6"))
    with pytest.raises(InputError, match=r"adapter\.r: was 4, is 8"):
        run_quietly(folder, "auto")


def test_trackers(tmp_path: Path, base: Path) -> None:
    folder = prepare_run(tmp_path / "run", base, report_to="tensorboard")
    run_quietly(folder)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = next(path for path in (folder / "trackers" / "run").glob("events*"))
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.step for event in accumulator.Scalars("eval_loss")] == [2, 4]


def test_a_missing_tracker_is_said_before_anything_starts(tmp_path: Path, base: Path) -> None:
    folder = prepare_run(tmp_path / "run", base, report_to="swanlab")
    with pytest.raises(InputError, match=r"report_to: not installed: swanlab"):
        run_quietly(folder)


def test_too_few_processes_is_an_error(tmp_path: Path, base: Path) -> None:
    folder = prepare_run(tmp_path / "run", base)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("num_processes: auto", "num_processes: 2"))
    with pytest.raises(RunError, match="asks for 2 processes, but 1 came up"):
        run_quietly(folder)


@pytest.fixture
def long_run(tmp_path: Path, base: Path) -> Iterator[Path]:
    yield prepare_run(tmp_path / "run", base, max_steps=100_000, eval_strategy="no", save_strategy="no")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_leave(long_run: Path, number: int, code: int) -> None:
    process = start(long_run)
    while len(read_log(long_run / "log.jsonl")) < 3 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert f"stopped by {signal.Signals(number).name} after step" in errors
    assert "Traceback" not in errors
    (checkpoint,) = long_run.glob("checkpoint-*")
    assert damage(checkpoint) is None
    assert read_log(long_run / "log.jsonl")[-1]["step"] == int(checkpoint.name[11:])
    assert not (long_run / "rank-0.log").exists()


def test_a_failure_is_logged_with_its_traceback(tmp_path: Path, base: Path) -> None:
    folder = prepare_run(tmp_path / "run", base)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    broken = save_base(tmp_path / "broken")
    from safetensors.torch import save_file

    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(base), str(broken)))
    process = start(folder)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("error: step 1: the loss or its gradient is not finite")
    log = (folder / "rank-0.log").read_text()
    assert "Traceback" in log
    assert log.splitlines()[-1].startswith("RunError: step 1")
    assert not list(folder.glob("checkpoint-*"))
    assert not (folder / "adapter_config.json").exists()


def test_two_processes(tmp_path: Path, base: Path) -> None:
    folder = prepare_run(tmp_path / "run", base, per_device_train_batch_size=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [*command, "-m", "peftcli.training.worker", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert RunResult.read(folder).verified == "reloaded, max |dlogit| 0.0"
    assert process.stdout.count("loss") == 6
    assert json.loads((folder / "checkpoint-4" / "trainer.json").read_text())["identity"]["processes"] == 2


def test_lora_plus(tmp_path: Path, base: Path) -> None:
    folder = prepare_run(tmp_path / "run", base, {**LORA, "lora_dropout": 0.0}, loraplus_lr_ratio=16.0)
    run_quietly(folder)
    groups = json.loads((folder / "checkpoint-4" / "trainer.json").read_text())["optimizer"]["groups"]
    assert [group["initial_lr"] for group in groups] == [1e-2, 1e-2 * 16]
