"""`peft train` in real processes: rehearsals, refusals that leave nothing, several processes, signals, JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

from .conftest import command_line, peft


def snapshot(folder: Path) -> dict[Path, bytes]:
    """Every file but the logs, which tell of refusals too."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}


def test_a_rehearsal_shows_everything_and_writes_nothing(place: Path) -> None:
    before = snapshot(place)
    shown = peft("train", "recipe.yaml", "training.seed=3", "--dry-run", cwd=place).stdout
    for part in (
        "override  training.seed=3",
        "12 samples",
        "one BOS",
        "2 x 1 accumulated x 1 process",
        "first sample:",
    ):
        assert part in shown
    learnt = next(line for line in shown.splitlines() if line.startswith("  learnt"))
    assert learnt.replace("|", "").replace(" ", "").endswith("finethanks<im_end>")
    assert snapshot(place) == before
    facts = json.loads(peft("train", "recipe.yaml", "--dry-run", "--json", cwd=place).stdout)
    assert (
        facts["data"]["train"]["samples"] == 12
        and facts["model"]["adapted"] == 14
        and facts["recipe"]["adapter"]["r"] == 4
    )


def test_a_refusal_leaves_nothing_behind(place: Path) -> None:
    with (place / "train.jsonl").open("a") as file:
        file.write('{"prompt": "x"\n')
    before = snapshot(place)
    done = peft("train", "recipe.yaml", "--output-dir", "new/run", cwd=place, code=2)
    assert "train.jsonl:17" in done.stderr and "data.train" in done.stderr
    assert snapshot(place) == before and not (place / "new").exists()


def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_written(place: Path) -> None:
    done = peft("train", "recipe.yaml", "adapter.target_modules=[nope]", "--overwrite", cwd=place, code=2)
    assert "adapter.target_modules" in done.stderr and "q_proj" in done.stderr and not (place / "run").exists()


def test_arguments_for_a_launcher_that_is_not_there(place: Path) -> None:
    done = peft("train", "recipe.yaml", "--", "--main_process_port", "29511", cwd=place, code=2)
    assert "no launcher" in done.stderr and not (place / "run").exists()


def test_two_processes_learn_what_one_does(place: Path) -> None:
    two = ["launcher.num_processes=2", "training.per_device_train_batch_size=1"]
    shown = peft("train", "recipe.yaml", *two, "--json", "--", "--main_process_port", "0", cwd=place)
    result = json.loads(shown.stdout)
    assert result["steps"] == 4 and result["verified"].startswith("reloaded")
    log = [json.loads(line) for line in (place / "run/log.jsonl").read_text().splitlines()]
    peft("train", "recipe.yaml", "--output-dir", "alone", cwd=place)
    alone = [json.loads(line) for line in (place / "alone/log.jsonl").read_text().splitlines()]
    for here, there in zip(log, alone, strict=True):
        for name in ("loss", "grad_norm", "eval_loss"):
            assert abs(here.get(name, 0) - there.get(name, 0)) < 1e-4


def test_a_refused_resume_changes_nothing(place: Path) -> None:
    peft("train", "recipe.yaml", cwd=place)
    before = snapshot(place / "run")
    changed = ["training.learning_rate=5e-3", "training.max_steps=6"]
    done = peft("train", "recipe.yaml", *changed, "--resume", "auto", cwd=place, code=2)
    assert "training.learning_rate" in done.stderr
    assert snapshot(place / "run") == before
    done = peft("train", "recipe.yaml", "--resume", "auto", cwd=place, code=2)
    assert "nothing is left to train" in done.stderr
    assert snapshot(place / "run") == before


def test_sigterm_saves_and_exits_with_143(place: Path) -> None:
    endless = ["training.max_steps=100000", "training.eval_strategy=no", "training.save_strategy=no"]
    process = subprocess.Popen(
        command_line("train", "recipe.yaml", *endless),
        cwd=place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = place / "run/log.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or not log.read_text().strip():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in said
    assert len(list((place / "run").glob("checkpoint-*/manifest.json"))) == 1
