"""`peft train` on a stream: the run that data held whole give, resumed to the bit, over two processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .conftest import Here, peft

CLOCK = ("tokens_per_second", "memory")
STREAM = ["~data.eval", "data.streaming=true", "training.max_steps=12", "training.save_steps=6"]


def curve(run: Path, *names: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if (k in names if names else k not in CLOCK)} for row in rows]


def test_a_chunk_with_all_rows_is_the_data_held_whole(place: Path, here: Here) -> None:
    """For an epoch of 8 steps: later ones are shuffled otherwise."""
    for packing in ("none", "bfd"):
        steps = ["training.max_steps=8" if packing == "none" else "training.max_steps=1", f"data.packing={packing}"]
        for name, streaming in (("whole", "false"), ("stream", "true")):
            here.peft(
                "train",
                "recipe.yaml",
                "~data.eval",
                *steps,
                f"data.streaming={streaming}",
                "--output-dir",
                name,
                "--overwrite",
            )
        names = ("step", "loss", "grad_norm", "lr", "tokens")
        assert curve(place / "whole", *names) == curve(place / "stream", *names)
        adapters = [(place / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "stream")]
        assert adapters[0] == adapters[1]


def test_a_resumed_stream_is_the_one_that_was_never_stopped(place: Path, here: Here) -> None:
    """From within a chunk: chunks of 5 rows are 3 steps, 16 rows 10; the data begin again, which is said."""
    small = [*STREAM, "data.buffer_size=5", "training.save_steps=5", "training.save_total_limit=9"]
    shown, _ = here.peft("train", "recipe.yaml", *small)
    assert "these are its first 16 rows" in shown and "off: the data are a stream" in shown
    assert "the data have ended after step 10: they begin again" in shown
    before, adapter = curve(place / "run"), (place / "run/adapter_model.safetensors").read_bytes()
    for step in (10, 5):
        for path in (place / "run").glob("checkpoint-*"):
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
        (place / "run/result.json").unlink()
        assert "continuing from" in here.peft("train", "recipe.yaml", *small, "--resume", "auto")[0]
        assert curve(place / "run") == before
        assert (place / "run/adapter_model.safetensors").read_bytes() == adapter
    assert {row["epoch"] for row in before} == {0.0, 1.0}


def test_a_stream_that_became_another_is_not_resumed(place: Path, here: Here) -> None:
    here.peft("train", "recipe.yaml", *STREAM)
    more = [*STREAM, "training.max_steps=14"]
    _, said = here.peft("train", "recipe.yaml", *more, "data.buffer_size=7", "--resume", "auto", code=2)
    assert "data.buffer_size" in said
    with (place / "train.jsonl").open("a") as file:
        file.write("\n")
    assert "data.train (bytes)" in here.peft("train", "recipe.yaml", *more, "--resume", "auto", code=2)[1]


def test_a_bad_row_far_behind_ends_the_run_by_name_and_leaves_its_checkpoint(place: Path, here: Here) -> None:
    text = (place / "train.jsonl").read_text()
    (place / "train.jsonl").write_text(text * 70 + "{\n")  # behind the rows that are audited
    _, said = here.peft(
        "train", "recipe.yaml", *STREAM, "data.buffer_size=1110", "training.max_steps=400", "training.save_steps=100",
        "training.per_device_train_batch_size=10", "--no-audit", code=2,
    )  # fmt: skip
    assert "train.jsonl:1121: data.train: " in said
    assert (place / "run/checkpoint-100/manifest.json").is_file()


def test_two_processes_share_the_chunks(place: Path, here: Here) -> None:
    small = [*STREAM, "data.buffer_size=6"]
    here.peft("train", "recipe.yaml", *small, "--output-dir", "one")
    two = ["launcher.num_processes=2", "training.per_device_train_batch_size=1", "--output-dir", "two"]
    peft("train", "recipe.yaml", *small, *two, "--", "--main_process_port", "0", cwd=place)
    pairs = zip(curve(place / "one"), curve(place / "two"), strict=True)
    for one, other in pairs:
        assert one["tokens"] == other["tokens"]
        assert abs(one["loss"] - other["loss"]) < 1e-4 and abs(one["grad_norm"] - other["grad_norm"]) < 1e-4
