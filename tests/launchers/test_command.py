"""The exact command line and environment of each launcher setting."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftcli.errors import InputError
from peftcli.launchers.command import command, in_process, processes
from peftcli.launchers.configs import CONFIGS, find, resolve
from peftcli.recipe.schema import LauncherSection, Recipe

HEAD = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
TAIL = ["--module", "peftcli.training.worker", "run folder", "--resume", "auto"]


def argv(extra: list[str] | None = None, **section: object) -> list[str]:
    launcher = LauncherSection.model_validate(section)
    return command(launcher, ["run folder", "--resume", "auto"], extra or [], base={}).argv


def test_ddp() -> None:
    expected = [*HEAD, str(CONFIGS / "accelerate/ddp.yaml"), "--num_processes", "2", *TAIL]
    assert argv(type="auto", num_processes=2) == expected
    assert argv(type="accelerate", num_processes=2) == expected


def test_one_process_under_accelerate() -> None:
    assert argv(type="accelerate", num_processes=1) == [
        *HEAD, str(CONFIGS / "accelerate/single.yaml"), "--num_processes", "1", *TAIL
    ]  # fmt: skip


def test_arguments_after_the_dashes_come_last_of_the_launchers() -> None:
    found = argv(["--main_process_port", "29511", "--tee", "a b"], type="accelerate", num_processes=3)
    assert found[-9:] == ["--main_process_port", "29511", "--tee", "a b", *TAIL]


def test_own_config(tmp_path: Path) -> None:
    assert argv(type="accelerate", num_processes=2, config="single")[4] == str(CONFIGS / "accelerate/single.yaml")
    assert argv(type="accelerate", num_processes=2, config=str(tmp_path / "x.yaml"))[4] == str(tmp_path / "x.yaml")
    with pytest.raises(InputError, match=r"launcher.config: .*\n.*one of ddp, single"):
        find("accelerate", "zero9")


def test_in_this_process() -> None:
    assert in_process(LauncherSection(type="none")) and in_process(LauncherSection(num_processes=1))
    assert not in_process(LauncherSection(type="accelerate", num_processes=1))
    assert not in_process(LauncherSection(num_processes=2))
    assert processes(LauncherSection(type="none")) == 1


def test_threads_are_shared_out_unless_the_user_has_said() -> None:
    launcher = LauncherSection(num_processes=2)
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    assert command(launcher, [], base={}).environment == {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    assert "OMP_NUM_THREADS" not in command(launcher, [], base={"OMP_NUM_THREADS": "7"}).environment


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_every_config(path: Path) -> None:
    from accelerate.commands.config import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_machines == 1
    assert path.stem != "ddp" or (config.distributed_type == "MULTI_GPU" and config.main_process_port == 0)


def test_the_top_level_folder_is_the_packaged_one() -> None:
    top = Path(__file__).parents[2] / "configs"
    assert top.resolve() == CONFIGS.resolve()
    assert all(isinstance(yaml.safe_load(path.read_text()), dict) for path in top.rglob("*.yaml"))


def recipe_with(launcher: dict[str, Any], **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name_or_path": "base"},
            "adapter": {"method": "lora"},
            "data": {"train": "train.jsonl"},
            "training": {"output_dir": "out", **training},
            "launcher": launcher,
        }
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_processes: 4", "num_processes: is 4, but the recipe makes it 2"),
        ("num_machines: 2", "num_machines: is 2, but the recipe makes it 1"),
        ("machine_rank: 1", "machine_rank: is 1, but the recipe makes it 0"),
        ("mixed_precision: bf16", "mixed_precision: is bf16, but the recipe makes it no"),
        ("main_process_port: 1234", "main_process_port: is 1234, but the recipe makes it 29511"),
        ("distributed_type: MULTI_CPU", "distributed_type: is MULTI_CPU"),
        ("distributed_type: 'NO'", "distributed_type: is NO"),
        ("fsdp_config: {fsdp_version: 2}", "fsdp_config: is not for launcher.type accelerate: launcher.type fsdp"),
        ("deepspeed_config: {zero_stage: 3}", "deepspeed_config: is not for launcher.type accelerate"),
        ("dynamo_config: {dynamo_backend: INDUCTOR}", "dynamo_config: is not for"),
    ],
)
def test_a_file_of_ones_own_that_contradicts_the_recipe(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"compute_environment: LOCAL_MACHINE\n{text}\n")
    launcher = {"type": "accelerate", "num_processes": 2, "main_process_port": 29511}
    with pytest.raises(InputError) as error:
        resolve(recipe_with({**launcher, "config": str(tmp_path / "own.yaml")}), 2)
    assert message in str(error.value) and str(tmp_path / "own.yaml") in str(error.value)


def test_a_file_of_ones_own_that_agrees(tmp_path: Path) -> None:
    text = (CONFIGS / "accelerate/ddp.yaml").read_text().replace('mixed_precision: "no"', "mixed_precision: bf16")
    (tmp_path / "own.yaml").write_text(text + "num_processes: 2\nfsdp_config: {}\n")
    launcher = {"type": "accelerate", "num_processes": 2, "config": str(tmp_path / "own.yaml")}
    assert resolve(recipe_with(launcher, bf16=True), 2) == {}
