"""FSDP2 in two real processes over gloo: equal to one process and to DDP, resumed to the bit, continued under the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftcli.errors import RunError
from peftcli.training import worker
from peftcli.training.strategies.fsdp import FullyShardedDataParallel
from training.side_by_side import (
    DDP,
    FSDP,
    LORA,
    Row,
    assert_equal,
    assert_same_end,
    copy_checkpoint,
    run_in_two,
    save_bases,
)
from training.tiny import settings

OFFLOAD = {**FSDP, "config": "fsdp-offload"}
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "bfloat16",
}


FAST = {  # methods on their own are in test_equality.py
    "modules_to_save": Row({**LORA, "modules_to_save": ["lm_head"]}, training={"gradient_checkpointing": True}),
    "full": Row({"method": "full"}, base="tied"),
}
SLOW = {
    "pissa": Row({**LORA, "init_lora_weights": "pissa"}),
    "embeddings": Row({**LORA, "target_modules": ["embed_tokens", "q_proj"]}),
    "ln_tuning": Row({"method": "ln_tuning"}),
    "prefix_tuning": Row({"method": "prefix_tuning", "num_virtual_tokens": 4}),
    "tied": Row({**LORA, "modules_to_save": ["embed_tokens", "lm_head"]}, base="tied"),
    "adafactor": Row(LORA, training={"optim": "adafactor"}),
    "full_in_windows": Row(
        {"method": "full"}, training={"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    ),
}
TWICE = {
    "bfloat16": Row(LORA, base="bfloat16"),
    "autocast": Row(LORA, training={"bf16": True}),
    "qlora": Row(
        {**LORA, "use_dora": True}, base="bfloat16", quantization=NF4, training={"gradient_checkpointing": True}
    ),
}
"""Compared with DDP: rounding in 16 bits depends on how many rows a batch has."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_bases(tmp_path_factory.mktemp("bases"))


def prepare_rows(folder: Path, rows: dict[str, Row], bases: dict[str, Path]) -> list[tuple[str, str | None]]:
    for name, row in rows.items():
        row.prepare(folder / name, bases[row.base], OFFLOAD if name == "full" else FSDP)
    return [(name, None) for name in rows]


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> Path:
    """Everything CI runs, in one pair of processes."""
    folder = tmp_path_factory.mktemp("fast")
    runs = prepare_rows(folder, FAST, bases)
    for name, row in TWICE.items():
        row.prepare(folder / name, bases[row.base], FSDP)
        row.prepare(folder / f"{name}-ddp", bases[row.base], DDP)
        runs += [(name, None), (f"{name}-ddp", None)]
    drops = Row({**LORA, "lora_dropout": 0.2})
    for name, launcher in (("whole", FSDP), ("whole-ddp", DDP)):
        drops.prepare(folder / name, bases["float32"], launcher)
        runs.append((name, None))
    run_in_two(folder, runs)
    resumed: list[tuple[str, str | None]] = []
    for name, source, launcher in (("again", "whole", FSDP), ("to-ddp", "whole", DDP), ("from-ddp", "whole-ddp", FSDP)):
        drops.prepare(folder / name, bases["float32"], launcher)
        copy_checkpoint(folder / source, folder / name)
        resumed.append((name, "auto"))
    run_in_two(folder, resumed)
    return folder


def test_what_runs_is_read_back(fast: Path) -> None:
    text = (fast / "whole" / "screen.txt").read_text()
    assert "2 processes share the base (FSDP2)" in text


@pytest.mark.parametrize("name", FAST)
def test_equals_one_process(name: str, fast: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    row = FAST[name]
    row.prepare_alone(tmp_path / "one", bases[row.base])
    worker.run(tmp_path / "one")
    assert_equal(tmp_path / "one", fast / name)


@pytest.mark.parametrize("name", TWICE)
def test_equals_ddp_in_16_and_4_bits(name: str, fast: Path) -> None:
    assert_equal(fast / f"{name}-ddp", fast / name)


def test_resumed_to_the_bit(fast: Path) -> None:
    assert_same_end(fast / "again", fast / "whole")


@pytest.mark.parametrize("name", ["to-ddp", "from-ddp"])
def test_a_checkpoint_is_continued_under_the_other_strategy(name: str, fast: Path) -> None:
    assert_equal(fast / "whole", fast / name)


@pytest.mark.slow
def test_every_kind_of_method_equals_one_process(bases: dict[str, Path], tmp_path: Path) -> None:
    run_in_two(tmp_path, prepare_rows(tmp_path, SLOW, bases))
    for name, row in SLOW.items():
        row.prepare_alone(tmp_path / f"{name}-one", bases[row.base])
        worker.run(tmp_path / f"{name}-one")
        assert_equal(tmp_path / f"{name}-one", tmp_path / name)


def test_one_process_without_a_launcher_is_refused() -> None:
    with pytest.raises(RunError, match="nothing to shard over"):
        FullyShardedDataParallel(settings())
