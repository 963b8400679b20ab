"""`peft train --sweep`: every combination checked first, run one after another, kept, continued, compared."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cli.conftest import Here, command_line
from peftcli.cli import run_folder
from peftcli.errors import InputError
from peftcli.recipe.load import load_recipe
from peftcli.sweep.grid import MAX_RUNS, make_grid, parse_axis

METHODS = "adapter.method=lora,dora,ia3"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("adapter.r=8,16", ("8", "16")),
        ("training.seed=1", ("1",)),
        ("adapter.target_modules=[q_proj, v_proj],all-linear", ("[q_proj, v_proj]", "all-linear")),
        ("adapter={method: lora, r: 8},{method: ia3}", ("{method: lora, r: 8}", "{method: ia3}")),
        ('training.run_name="a,b",c', ('"a,b"', "c")),
    ],
)
def test_values_are_split_at_their_own_commas(text: str, values: tuple[str, ...]) -> None:
    axis = parse_axis(text)
    assert (axis.field, axis.values) == (text.partition("=")[0], values)


@pytest.mark.parametrize("text", ["adapter.r", "=1,2", "adapter.r=1,,2", "adapter.r=8,8", "training.output_dir=a,b"])
def test_what_is_no_axis_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--sweep"):
        parse_axis(text)


def grid(place: Path, *axes: str, overrides: tuple[str, ...] = ()) -> dict[str, object]:
    made = make_grid(place / "recipe.yaml", overrides, [parse_axis(axis) for axis in axes])
    return {combination.name: combination for combination in made.combinations}


def test_every_combination_is_a_whole_recipe(place: Path) -> None:
    found = grid(place, METHODS, "training.learning_rate=1e-4,3e-4", overrides=("training.seed=7",))
    assert list(found)[:3] == [
        "method-lora_learning_rate-1e-4",
        "method-lora_learning_rate-3e-4",
        "method-dora_learning_rate-1e-4",
    ]
    assert len(found) == 6
    dora = found["method-dora_learning_rate-3e-4"].recipe
    assert dora == load_recipe(
        place / "recipe.yaml",
        [
            "adapter.use_dora=true",
            "training.learning_rate=3e-4",
            "training.seed=7",
            "training.output_dir=run/sweep/method-dora_learning_rate-3e-4",
        ],
    )


def test_fields_the_method_does_not_have_are_left_out_of_the_recipe_and_said(place: Path) -> None:
    found = grid(place, METHODS)
    assert [combination.left_out for combination in found.values()] == [(), (), ("r",)]
    assert found["method-ia3"].recipe.adapter.config.target_modules == "all-linear", "what both have stays"


def test_a_field_that_was_typed_is_never_left_out(place: Path) -> None:
    for axes, overrides in (((METHODS, "adapter.r=8,16"), ()), ((METHODS,), ("adapter.r=8",))):
        with pytest.raises(InputError, match=r"run adapter\.method=ia3.*ia3 has no such field") as refused:
            grid(place, *axes, overrides=overrides)
        assert (
            "adapter={method: ia3, ...}" in str(refused.value)
            and "method=lora" not in str(refused.value).split("fix")[0]
        )
    misspelt = (place / "recipe.yaml").read_text().replace("r: 4", "rr: 4")
    (place / "recipe.yaml").write_text(misspelt)
    with pytest.raises(InputError, match=r"adapter\.rr"):
        grid(place, "adapter.method=lora,ia3")


def test_sections_give_each_method_its_own_fields(place: Path) -> None:
    found = grid(place, "adapter={method: lora, r: 8},{method: prompt_tuning, num_virtual_tokens: 5}")
    assert [c.recipe.adapter.method for c in found.values()] == ["lora", "prompt_tuning"]
    assert list(found) == ["adapter-method-lora-r-8", "adapter-method-prompt_tuning-num_virtual_tokens-5"]


def test_long_names_are_cut_and_still_tell_runs_apart(place: Path) -> None:
    long = ",".join(f"[q_proj,{'v_proj,' * 30}{last}]" for last in ("k_proj", "o_proj"))
    names = list(grid(place, f"adapter.target_modules={long}"))
    assert len(set(names)) == 2 and all(len(name) == 100 for name in names)


def test_impossible_sweeps_are_refused(place: Path) -> None:
    for axes, message in (
        (["training.learning_rate=1e-4,0.0001"], "is the same run as"),
        (["adapter.r=1,2", "adapter.r=3"], "is swept twice"),
        (["adapter.r=" + ",".join(map(str, range(1, MAX_RUNS + 2)))], "1,001 runs"),
        (["adapter.method=lora,lorra"], "lorra"),
        (["adapter.r=0,-1"], "adapter.r=-1"),
    ):
        with pytest.raises(InputError, match=message):
            grid(place, *axes)


def test_nothing_is_started_if_one_combination_is_wrong(place: Path, here: Here) -> None:
    said = here.peft("train", "recipe.yaml", "--sweep", "adapter.target_modules=all-linear,[nope]", code=2)[1]
    assert "run adapter.target_modules=[nope]" in said and not (place / "run").exists()
    shown, _ = here.peft("train", "recipe.yaml", "--sweep", METHODS, "training.seed=1,2", "--check")
    assert "valid recipes for 6 runs" in shown
    assert "resume" in here.peft("train", "recipe.yaml", "--sweep", METHODS, "--resume", "auto", code=2)[1]


def test_a_rehearsal_lists_the_runs(place: Path, here: Here) -> None:
    shown, said = here.peft("train", "recipe.yaml", "--sweep", METHODS, "training.learning_rate=1e-4,3e-4", "--dry-run")
    lines = [line.split() for line in shown.splitlines()]
    assert ["ia3", "3e-4", "288", "to", "run"] in lines and ["lora", "1e-4", "2,048", "to", "run"] in lines
    assert "ia3 has no r: left out" in said and not (place / "run").exists()


def test_a_sweep_from_end_to_end(place: Path, here: Here) -> None:
    """The first of two runs fails (its samples are longer than it allows); the other finishes, and is kept later."""
    sweep = ["--sweep", "data.max_length=4,1024"]
    shown, _ = here.peft("train", "recipe.yaml", *sweep, code=1)
    folder = place / "run" / "sweep"
    table = json.loads((folder / "sweep.json").read_text())
    assert [run["state"] for run in table["runs"]] == ["failed", "done"]
    failed, done = table["runs"]
    assert "samples longer than 4 tokens" in failed["reason"] and failed["metrics"] is None
    assert "failed: " in shown and failed["log"] in shown and table["best"] == done["name"]
    assert done["trainable_parameters"] == 2048 and done["peak_memory_bytes"] > 1e8 and done["seconds"] > 0
    weights = place / done["folder"] / "adapter_model.safetensors"
    assert done["file_bytes"] == weights.stat().st_size
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "sweep.md").read_text()
    assert f"| 1024 | **{done['metrics']['eval_loss']:.5g}** | 2,048 |" in text and "| 4 | failed |" in text

    before = weights.stat().st_mtime_ns
    shown, _ = here.peft("train", "recipe.yaml", "--sweep", "data.max_length=1024", "--json", code=0)
    assert [run["state"] for run in json.loads(shown)["runs"]] == ["done"]
    assert weights.stat().st_mtime_ns == before, "a finished run is not run again"

    message = here.peft("train", "recipe.yaml", "training.seed=1", *sweep, code=2)[1]
    assert "holds the run of another recipe" in message and "--overwrite" in message
    (place / "train.jsonl").write_text((place / "train.jsonl").read_text())
    assert "changed" in here.peft("train", "recipe.yaml", *sweep, code=2)[1]
    run_folder.require_usable(place / "run", overwrite=False, resume=False)  # the recipe's own run is still possible


def test_a_stopped_sweep_goes_on_where_it_was(place: Path, here: Here) -> None:
    """SIGTERM in the first of two runs: it saves, the sweep ends with the signal's code, and the next one continues it."""
    long = ["training.max_steps=200", "training.save_steps=200", "training.eval_strategy=no"]
    arguments = ["recipe.yaml", *long, "--sweep", "training.seed=1,2"]
    log = place / "run" / "sweep" / "seed-1" / "log.jsonl"
    process = subprocess.Popen(
        command_line("train", *arguments), cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size > 200) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert (
        "stopped by SIGTERM; the same command (without --overwrite) goes on from here" in said
        and "Traceback" not in said
    )
    table = json.loads((place / "run" / "sweep" / "sweep.json").read_text())
    assert [run["state"] for run in table["runs"]] == ["interrupted", "not run yet"]
    shown, _ = here.peft("train", *arguments)
    assert "seed=1: continued" in shown
    assert "continuing from" in (place / "run" / "sweep" / "seed-1.log").read_text()
    for seed in (1, 2):
        result = json.loads((place / "run" / "sweep" / f"seed-{seed}" / "result.json").read_text())
        assert result["steps"] == 200
