"""`peft train`: rehearsals, refusals that leave nothing behind, several processes, signals, JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

from .conftest import Here, command_line, peft


def snapshot(folder: Path) -> dict[Path, bytes]:
    """Every file but the logs, which tell of refusals too."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}


def test_a_rehearsal_shows_everything_and_writes_nothing(place: Path, here: Here) -> None:
    before = snapshot(place)
    shown, _ = here.peft("train", "recipe.yaml", "training.seed=3", "--dry-run")
    for part in (
        *(
            "override  training.seed=3",
            "14 modules",
            "12 samples",
            "one BOS",
            "2 x 1 accumulated x 1 process",
            "4, 1 of them to warm up",
        ),
        *("memory on cpu", "activations", "available", "first sample:"),
    ):
        assert part in shown
    learnt = next(line for line in shown.splitlines() if line.startswith("  learnt"))
    assert learnt.replace("|", "").replace(" ", "").endswith("finethanks<im_end>")
    assert snapshot(place) == before


def test_a_rehearsal_as_json(here: Here) -> None:
    facts = json.loads(here.peft("train", "recipe.yaml", "--dry-run", "--json")[0])
    assert facts["data"]["train"]["samples"] == 12 and facts["model"]["adapted"] == 14
    assert facts["steps"] == 4 and facts["recipe"]["adapter"]["r"] == 4 and facts["memory"]["parts"]["adapter"] > 0


def test_a_refusal_leaves_nothing_behind(place: Path, here: Here) -> None:
    with (place / "train.jsonl").open("a") as file:
        file.write('{"prompt": "x"\n')
    before = snapshot(place)
    _, said = here.peft("train", "recipe.yaml", "--output-dir", "new/run", code=2)
    assert "train.jsonl:17" in said and "data.train" in said
    assert snapshot(place) == before and not (place / "new").exists()


def test_data_that_the_audit_finds_fault_with_is_refused_unless_told_otherwise(place: Path, here: Here) -> None:
    """It is evaluated on what it learns. All is shown first, nothing is written, and `--no-audit` trains on it as it is."""
    before = snapshot(place)
    same = "data.eval=train.jsonl"
    found = "evaluation apart: evaluation rows that are training rows: 16 of 16"
    for arguments in ([], ["--dry-run"]):
        shown, said = here.peft("train", "recipe.yaml", same, *arguments, code=2)
        assert f"LOOK  {found}" in shown and f"data: the audit found what spoils a training run: {found}" in said
        assert snapshot(place) == before
    facts, _ = here.peft("train", "recipe.yaml", same, "--dry-run", "--json", code=2)
    assert [fact["name"] for fact in json.loads(facts)["data"]["audit"] if not fact["ok"]] == ["evaluation apart"]
    short = [same, "training.max_steps=1", "--no-audit"]
    here.peft("train", "recipe.yaml", *short, "--sweep", "training.seed=1")
    here.peft("train", "recipe.yaml", *short, "--overwrite")
    written = json.loads((place / "run" / "data" / "audit.json").read_text())
    assert written["overlap"] == 16


def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_written(place: Path, here: Here) -> None:
    _, said = here.peft("train", "recipe.yaml", "adapter.target_modules=[nope]", "--overwrite", code=2)
    assert "adapter.target_modules" in said and "q_proj" in said and not (place / "run").exists()


def test_what_only_the_model_shows_to_be_wrong_is_told_with_its_line(place: Path, here: Here) -> None:
    recipe = place / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("all-linear", "[nope]"))
    _, said = here.peft("train", "recipe.yaml", code=2)
    assert "recipe.yaml:3:47: adapter.target_modules" in said and "override" not in said


def test_what_only_the_number_of_steps_shows_to_be_wrong(here: Here) -> None:
    two_epochs = ("training.max_steps=-1", "training.num_train_epochs=2")
    shown, _ = here.peft("train", "recipe.yaml", *two_epochs, "training.warmup_steps=12", "--dry-run")
    assert "steps     12, 12 of them to warm up" in shown and "never reaches its peak" in shown
    adalora = ("~adapter.r", "adapter.method=adalora", "adapter.tinit=5", "adapter.tfinal=5")
    here.peft("train", "recipe.yaml", *two_epochs, *adalora, "--dry-run")
    _, said = here.peft("train", "recipe.yaml", *adalora, "--dry-run", code=2)
    assert "adapter.total_step" in said and "budgeting phase" in said


def test_a_users_own_folder_is_not_taken_for_a_runs(place: Path, here: Here) -> None:
    """The recipe's own folder, with data in `data`: a run there would replace both."""
    (place / "own/data").mkdir(parents=True)
    (place / "train.jsonl").rename(place / "own/data/train.jsonl")
    text = (place / "recipe.yaml").read_text().replace("base}", "../base}").replace("train.jsonl", "data/train.jsonl")
    (place / "own/recipe.yaml").write_text(text)
    before = snapshot(place / "own")
    for option in ((), ("--overwrite",), ("--resume", "auto")):
        _, said = here.peft("train", "own/recipe.yaml", "--output-dir", "own", *option, code=2)
        assert "someone's own" in said
        assert snapshot(place / "own") == before


def test_arguments_for_a_launcher_that_is_not_there(place: Path, here: Here) -> None:
    _, said = here.peft("train", "recipe.yaml", "--", "--main_process_port", "29511", code=2)
    assert "no launcher" in said and not (place / "run").exists()


def test_a_refused_resume_changes_nothing(place: Path, here: Here) -> None:
    here.peft("train", "recipe.yaml")
    before = snapshot(place / "run")
    changed = ["training.learning_rate=5e-3", "training.max_steps=6"]
    assert "training.learning_rate" in here.peft("train", "recipe.yaml", *changed, "--resume", "auto", code=2)[1]
    assert snapshot(place / "run") == before
    assert "nothing is left to train" in here.peft("train", "recipe.yaml", "--resume", "auto", code=2)[1]
    assert snapshot(place / "run") == before


def test_two_processes_learn_what_one_does(place: Path, here: Here) -> None:
    two = ["launcher.num_processes=2", "training.per_device_train_batch_size=1"]
    shown = peft("train", "recipe.yaml", *two, "--json", "--", "--main_process_port", "0", cwd=place)
    result = json.loads(shown.stdout)
    assert result["steps"] == 4 and result["verified"].startswith("reloaded")
    log = [json.loads(line) for line in (place / "run/log.jsonl").read_text().splitlines()]
    here.peft("train", "recipe.yaml", "--output-dir", "alone")
    alone = [json.loads(line) for line in (place / "alone/log.jsonl").read_text().splitlines()]
    for here, there in zip(log, alone, strict=True):
        for name in ("loss", "grad_norm", "eval_loss"):
            assert abs(here.get(name, 0) - there.get(name, 0)) < 1e-4


def test_a_second_run_takes_its_data_from_the_cache_and_is_the_same(place: Path, here: Here) -> None:
    """Also when the loop packs them; a changed row is tokenised anew."""
    shown = [here.peft("train", "recipe.yaml", "--output-dir", name)[0] for name in ("first", "second")]
    assert "  cache    kept in " in shown[0] and "  cache    data from cache " in shown[1]
    for name in ("data/train.safetensors", "data/eval.safetensors", "data/audit.json", "adapter_model.safetensors"):
        assert (place / "first" / name).read_bytes() == (place / "second" / name).read_bytes()
    curves = [
        [
            {name: value for name, value in json.loads(line).items() if name not in ("tokens_per_second", "memory")}
            for line in (place / name / "log.jsonl").read_text().splitlines()
        ]
        for name in ("first", "second")
    ]
    assert curves[0] == curves[1] and len(curves[0]) > 4
    assert "data from cache" in here.peft("train", "recipe.yaml", "--dry-run", "data.packing=bfd")[0]
    assert "off: data.cache is false" in here.peft("train", "recipe.yaml", "--dry-run", "data.cache=false")[0]
    text = (place / "train.jsonl").read_text()
    (place / "train.jsonl").write_text(text.replace("what 3", "what 4"))
    assert "data from cache" not in here.peft("train", "recipe.yaml", "--dry-run")[0]


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
