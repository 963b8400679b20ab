"""DeepSpeed's ZeRO in two real processes over gloo: equal to one process, resumed to the bit, continued under others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from cli.conftest import peft
from faults.nursery import make_place, outcome
from safetensors.torch import load_file

from peftcli.data.tokens import TokenDataset
from peftcli.training import worker
from peftcli.training.batches import training_windows
from peftcli.training.losses import chunk_rows
from training.run_folders import save_base
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
from training.task_runs import prepare_halves, run_alone
from training.tiny import VOCABULARY, settings, tiny_llama, tiny_model

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


ZERO = {name: zero(name) for name in ("zero1", "zero2", "zero3", "zero3-offload")}
ZERO |= {"zero2-offload": zero(str(Path(__file__).with_name("zero2-offload.json")))}
LAUNCHERS = ZERO | {"ddp": DDP, "fsdp": FSDP}
FAST = {
    "lora": Row({**LORA, "target_modules": "all-linear"}, training={"gradient_accumulation_steps": 2}),
    "adalora": Row(ADALORA),
    "full": Row({"method": "full"}, base="tied"),
}
"""Fast. Full has two groups of parameters."""
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
ZERO3 = {
    "experts": Row({**LORA, **EXPERTS}, base="mixture"),
    "modules_to_save": Row({**LORA, "modules_to_save": ["lm_head"]}, training={"gradient_checkpointing": True}),
    "long": Row(LORA, base="long"),
}
"""Fast. The long samples' losses take several pieces, of each process another number."""
UNDER = {"lora": tuple(ZERO), "adalora": ("zero1", "zero2", "zero3", "zero2-offload"), "full": ("zero2", "zero3")}
UNDER |= dict.fromkeys(ZERO3, ("zero3",))
"""Where the fast ones run; elsewhere they are slow."""
SLOW = {
    "dora": Row({**LORA, "use_dora": True}),
    "pissa": Row({**LORA, "init_lora_weights": "pissa"}),
    "bias": Row({**LORA, "bias": "lora_only"}),
    "embeddings": Row({**LORA, "target_modules": ["embed_tokens", "q_proj"]}),
    "head": Row({**LORA, "target_modules": ["lm_head", "q_proj"]}),
    "tokens": Row({**LORA, "trainable_token_indices": [1, 2, 3]}),
    "both_tied": Row({**LORA, "modules_to_save": ["embed_tokens", "lm_head"]}, base="tied"),
    "checkpointed": Row(
        {**LORA, "use_dora": True}, training={"gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    ),
    "full_in_windows": Row(
        {"method": "full"}, training={"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    ),
    "ln_tuning": Row({"method": "ln_tuning"}),
    "tied": Row(LORA, base="tied"),
    "ia3": Row({"method": "ia3"}),
    "loha": Row({"method": "loha", "r": 4, "target_modules": ["q_proj"]}),
    "lokr": Row({"method": "lokr", "r": 4, "target_modules": ["q_proj"]}),
    "oft": Row({"method": "oft", "oft_block_size": 4, "target_modules": ["q_proj"]}),
    "vera": Row({"method": "vera", "r": 4, "target_modules": ["q_proj"]}),
    "prompt_tuning": Row({"method": "prompt_tuning", "num_virtual_tokens": 4}),
    "prefix_tuning": Row({"method": "prefix_tuning", "num_virtual_tokens": 4}),
}
BFLOAT16 = Row(LORA, base="bfloat16", training={"bf16": True})
DROPS = Row({**LORA, "lora_dropout": 0.2})
TASKS = ("SEQ_2_SEQ_LM", "dpo")
"""Fast; the others are in test_zero3.py."""
CONTINUED = [
    ("zero2", "zero2"),
    ("zero1", "zero1"),
    ("zero2", "ddp"),
    ("fsdp", "zero2"),
    ("zero1", "zero2"),
    ("zero3", "zero3"),
    ("zero3", "ddp"),
    ("fsdp", "zero3"),
    ("zero2-offload", "zero2-offload"),
    ("zero3-offload", "zero3-offload"),
    ("zero3", "zero3-offload"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    mixture = save_base(folder / "mixture")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(tiny_llama().config, name) for name in (*names, "num_key_value_heads", "initializer_range")}
    tiny_model("mixtral", **sizes, num_local_experts=4).save_pretrained(mixture)
    return {**save_bases(folder), "long": save_base(folder / "long", max_position_embeddings=512), "mixture": mixture}


def prepare(row: Row, folder: Path, bases: dict[str, Path], launcher: Launcher | None = None) -> None:
    """In one process without a launcher."""
    if launcher is None:
        row.prepare_alone(folder, bases[row.base])
    else:
        row.prepare(folder, bases[row.base], launcher)
    if row.base == "long":
        long_data().save(folder / "data" / "train.safetensors")


def long_data() -> TokenDataset:
    """Every other sample has more labels than the loss takes at once."""
    lengths = (300 if number % 2 else 9 for number in range(16))
    tokens = np.random.default_rng(0)
    pairs = ((tokens.integers(1, VOCABULARY, n).astype(np.int32), np.arange(n) > 0) for n in lengths)
    return TokenDataset.from_samples(pairs)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> Path:
    """Everything CI runs, in one pair of processes."""
    folder = tmp_path_factory.mktemp("fast")
    runs: list[tuple[str, str | None]] = []
    for name, row in {**FAST, **ZERO3}.items():
        for launcher in UNDER[name]:
            prepare(row, folder / f"{name}-{launcher}", bases, LAUNCHERS[launcher])
            runs.append((f"{name}-{launcher}", None))
    for task in TASKS:
        prepare_halves(run_alone(task, folder / task), folder / f"{task}-zero3", LAUNCHERS["zero3"])
        runs.append((f"{task}-zero3", None))
    for launcher in ("zero3", "ddp"):
        BFLOAT16.prepare(folder / f"bfloat16-{launcher}", bases["bfloat16"], LAUNCHERS[launcher])
        runs.append((f"bfloat16-{launcher}", None))
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


@pytest.mark.parametrize("name", [*FAST, *ZERO3])
def test_equals_one_process(name: str, fast: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    prepare({**FAST, **ZERO3}[name], tmp_path / "one", bases)
    worker.run(tmp_path / "one")
    for launcher in UNDER[name]:
        assert_equal(tmp_path / "one", fast / f"{name}-{launcher}")


@pytest.mark.parametrize("task", TASKS)
def test_a_task_under_zero3_equals_one_process(task: str, fast: Path) -> None:
    assert_equal(fast / task / "run", fast / f"{task}-zero3")


@pytest.mark.slow
def test_every_row_under_every_stage_equals_one_process(tmp_path: Path, bases: dict[str, Path]) -> None:
    rows = {**FAST, **ZERO3, "checkpointed": SLOW["checkpointed"]}
    others = [(name, launcher) for name in rows for launcher in ZERO if launcher not in UNDER.get(name, ())]
    for name, launcher in others:
        prepare(rows[name], tmp_path / f"{name}-{launcher}", bases, LAUNCHERS[launcher])
    run_in_two(tmp_path, [(f"{name}-{launcher}", None) for name, launcher in others])
    for name in rows:
        prepare(rows[name], tmp_path / name, bases)
        worker.run(tmp_path / name)
    for name, launcher in others:
        assert_equal(tmp_path / name, tmp_path / f"{name}-{launcher}")


def test_long_samples_take_processes_different_numbers_of_pieces() -> None:
    """Else the row says nothing about heads that are called more often in one process than in the other."""
    data, rows = long_data(), chunk_rows(torch.device("cpu"))
    chosen = settings(per_device_train_batch_size=2, group_by_length=False)
    windows = (training_windows(data, chosen, 0, world_size=2, rank=rank, row_length=None) for rank in (0, 1))
    pieces = [[-(-int(data.label_counts[window[0]].sum()) // rows) for window in own] for own in windows]
    assert pieces[0] != pieces[1]


def test_a_sharded_base_in_16_bits_differs_from_ddp_by_rounding(fast: Path) -> None:
    assert_equal(fast / "bfloat16-ddp", fast / "bfloat16-zero3", losses=5e-3, values=2e-3)


def test_what_runs_is_read_back(fast: Path) -> None:
    screens = {name: " ".join((fast / f"lora-{name}/screen.txt").read_text().split()) for name in ZERO}
    assert "2 processes share the base (DeepSpeed ZeRO-3)" in screens["zero3"]
    assert "(DeepSpeed ZeRO-2); the optimizer in main memory" in screens["zero2-offload"]
    assert "values are here; the optimizer and the shards in main memory" in screens["zero3-offload"]
    assert {name for name, screen in screens.items() if "in main memory" not in screen} == {"zero1", "zero2", "zero3"}


@pytest.mark.slow
def test_every_kind_of_module_under_zero3_equals_one_process(tmp_path: Path, bases: dict[str, Path]) -> None:
    for name, row in SLOW.items():
        prepare(row, tmp_path / name, bases, LAUNCHERS["zero3"])
    run_in_two(tmp_path, [(name, None) for name in SLOW])
    for name, row in SLOW.items():
        prepare(row, tmp_path / f"{name}-one", bases)
        worker.run(tmp_path / f"{name}-one")
        assert_equal(tmp_path / f"{name}-one", tmp_path / name)


def test_train_saves_the_whole_adapter_under_zero3(tmp_path: Path) -> None:
    make_place(tmp_path)
    launcher = "launcher={type: deepspeed, num_processes: 2, config: zero3}"
    peft("train", "recipe.yaml", "training.output_dir=run", launcher, cwd=tmp_path)
    config = json.loads((tmp_path / "run/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "run/adapter_model.safetensors")
    assert tensors
    for name, tensor in tensors.items():
        assert tensor.dim() == 2 and tensor.shape[".lora_B." in name] == config["r"], name
        assert all(half.count_nonzero() for half in tensor.flatten().chunk(2)), name
    assert json.loads((tmp_path / "run/result.json").read_text())["difference"] == 0


@pytest.mark.parametrize("launcher", ZERO)
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
