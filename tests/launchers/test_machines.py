"""Several machines: what each is started with, and whole runs of two "machines" that meet over loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import RECIPE, command_line, peft
from safetensors.torch import load_file
from training.tiny import save_tiny_llama

from peftcli.cli import main
from peftcli.launchers.command import command
from peftcli.recipe.schema import LauncherSection

TWO = ["launcher.num_machines=2", "launcher.num_processes=2", "launcher.main_process_ip=127.0.0.1"]
HALVES = "training.per_device_train_batch_size=1"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tiny_llama(folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two processes on one machine."""
    folder = user(tmp_path_factory.mktemp("alone"), base)
    peft("train", "recipe.yaml", "launcher.num_processes=2", HALVES, cwd=folder)
    return folder / "run"


def user(folder: Path, base: Path, answer: str = "fine thanks") -> Path:
    """A folder from which `peft train recipe.yaml` can be called."""
    folder.mkdir(exist_ok=True)
    (folder / "base").symlink_to(base)
    rows = [{"prompt": f"what {number}", "completion": answer} for number in range(16)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def start(folders: list[Path], *overrides: str) -> list[subprocess.Popen[str]]:
    """`peft train` on two machines, each in a folder of its own or in the same."""
    common = ["train", "recipe.yaml", *TWO, HALVES, f"launcher.main_process_port={port()}", *overrides]
    return [
        subprocess.Popen(
            command_line(*common, f"launcher.machine_rank={rank}"),
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]


def finish(machines: list[subprocess.Popen[str]], code: int = 0) -> list[str]:
    """What the machines said; each must exit with `code`."""
    said = []
    for machine in machines:
        out, error = machine.communicate(timeout=300)
        assert machine.returncode == code, f"exit code {machine.returncode}\n{out}\n{error}"
        assert "Traceback" not in out + error
        said.append(out + error)
    return said


def curve(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("step", "loss", "grad_norm", "eval_loss") if key in row} for row in rows]


def assert_same(run: Path, other: Path) -> None:
    for row, there in zip(curve(run), curve(other), strict=True):
        assert row == pytest.approx(there, abs=1e-5)
    expected = load_file(other / "adapter_model.safetensors")
    for name, tensor in load_file(run / "adapter_model.safetensors").items():
        assert (tensor - expected[name]).abs().max() < 1e-5, name


# -- what is started ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["auto", "accelerate", "deepspeed", "fsdp"])
def test_every_launcher_is_told_where_the_machines_meet(kind: str) -> None:
    launcher = LauncherSection.model_validate(
        {"type": kind, "num_processes": 8, "num_machines": 2, "machine_rank": 1, "main_process_ip": "node-0"}
    )
    argv = command(launcher, ["run"], base={}).argv
    assert argv[argv.index("--num_processes") :] == [
        *("--num_processes", "8", "--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "node-0"),
        *("--main_process_port", "29500", "--rdzv_conf", "timeout=120", "--module", "peftcli.training.worker", "run"),
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (["num_machines=2", "machine_rank=2"], "machine_rank is 2, but launcher.num_machines is 2"),
        (["machine_rank=1"], "machine_rank is 1, but launcher.num_machines is 1"),
        (["num_machines=2", "num_processes=3"], "num_processes is 3"),
        (["num_machines=2", "type=none"], "type none starts one process"),
        (["main_process_ip=node-0"], "there is only one"),
        (["num_machines=2", "main_process_port=70000"], "main_process_port"),
    ],
)
def test_what_does_not_add_up(fields: list[str], said: str, base: Path, tmp_path: Path, capsys: Any) -> None:
    user(tmp_path / "user", base)
    recipe = str(tmp_path / "user/recipe.yaml")
    assert main(["train", recipe, "--check", *(f"launcher.{field}" for field in fields)]) == 2
    assert said in capsys.readouterr().err


def test_a_machine_must_know_itself_and_the_first(base: Path, tmp_path: Path, capsys: Any) -> None:
    folder = user(tmp_path / "user", base)
    output = str(tmp_path / "run")
    assert main(["train", str(folder / "recipe.yaml"), "launcher.num_machines=2", "--output-dir", output]) == 2
    said = capsys.readouterr().err
    assert "launcher.machine_rank: is needed" in said and "launcher.main_process_ip: is needed" in said
    assert not (tmp_path / "run").exists()


def test_commands_for_each_machine(base: Path, tmp_path: Path, capsys: Any) -> None:
    recipe = str(user(tmp_path / "a user", base) / "recipe.yaml")
    assert main(["train", recipe, *TWO, "launcher.machine_rank=1", "--emit", "commands", "--", "--tee", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"peft train '{recipe}' {' '.join(TWO)} launcher.machine_rank={rank} -- --tee 3" for rank in (0, 1)
    ]
    assert main(["train", recipe, TWO[0], "--emit", "commands"]) == 2
    assert "launcher.main_process_ip" in capsys.readouterr().err
    assert main(["train", recipe, "--emit", "pbs"]) == 2
    assert "allowed: commands, slurm" in capsys.readouterr().err


def test_a_script_for_slurm(base: Path, tmp_path: Path, capsys: Any) -> None:
    """Run by bash, with `srun` and `scontrol` of ours that do what Slurm's would on the second of two nodes."""
    folder = user(tmp_path / "a user", base)
    assert main(["train", str(folder / "recipe.yaml"), *TWO[:2], "--emit", "slurm", "--", "--tee", "3"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=2\n" in script and "#SBATCH --gpus-per-node=1\n" in script
    tools = {
        "scontrol": 'echo "$3-first"; echo "$3-second"',
        "srun": 'while [ "$1" != bash ]; do shift; done; SLURM_NODEID=1 "$@"',
        "peft": 'printf "%s\\n" "$@"',
    }
    (tmp_path / "bin").mkdir()
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-2]"}
    environment["SLURM_CPUS_ON_NODE"] = "8"
    done = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        *("train", str(folder / "recipe.yaml"), *TWO[:2], "launcher.machine_rank=1"),
        *("launcher.main_process_ip=n[1-2]-first", "--", "--tee", "3"),
    ]
    assert main(["train", str(folder / "recipe.yaml"), TWO[0], "--emit", "slurm"]) == 2
    assert "launcher.num_processes: is auto" in capsys.readouterr().err


# -- real runs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_machines_with_one_folder_are_two_processes(base: Path, tmp_path: Path, alone: Path) -> None:
    folder = user(tmp_path / "user", base)
    first, second = finish(start([folder, folder]))
    assert "2 processes, each with the whole model (DDP)" in first and "done" in first
    assert "machine 1 is done; machine 0 has written the results" in second and "step 1/4" not in second
    assert_same(folder / "run", alone)
    assert {path.name for path in (folder / "run/machine-1").iterdir()} == {"data", "recipe.yaml", "launcher.log"}


@pytest.mark.parametrize(
    "kind", ["accelerate", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fsdp", "deepspeed"))]
)
def test_machines_that_share_no_files_continue_a_run(kind: str, base: Path, tmp_path: Path, alone: Path) -> None:
    """Only machine 0 has the checkpoint, which one machine has written; the other gets what it must read."""
    folders = [user(tmp_path / name, base) for name in ("first", "second")]
    shutil.copytree(alone, folders[0] / "run", ignore=shutil.ignore_patterns("checkpoint-4", "result.json"))
    first, second = finish(start(folders, f"launcher.type={kind}", "training.resume_from_checkpoint=auto"))
    assert f"continuingfrom{folders[0] / 'run/checkpoint-2'}" in "".join(first.split()), "wrapped on the screen"
    assert "machine 1 is done; machine 0 has written the results" in second and "step 3/4" not in second
    assert_same(folders[0] / "run", alone)
    assert sorted(path.name for path in (folders[1] / "run").iterdir()) == ["machine-1"]
    assert {path.name for path in (folders[1] / "run/machine-1").iterdir()} == {"data", "recipe.yaml", "launcher.log"}


def test_machines_that_prepared_different_data_are_refused(base: Path, tmp_path: Path) -> None:
    folders = [user(tmp_path / "first", base), user(tmp_path / "second", base, answer="not so well")]
    for said in finish(start(folders), code=2):
        assert "machine 1: data.train: is" in said and "on machine 0" in said
    assert not (folders[0] / "run/checkpoint-2").exists()


@pytest.mark.parametrize(("rank", "says"), [(0, "not all machines have come"), (1, "machine 0 does not answer")])
def test_a_machine_that_is_left_alone_says_so(rank: int, says: str, base: Path, tmp_path: Path) -> None:
    folder = user(tmp_path / "user", base)
    meeting = [*TWO, f"launcher.machine_rank={rank}", f"launcher.main_process_port={port()}", "launcher.timeout=1"]
    said = peft("train", "recipe.yaml", *meeting, cwd=folder, code=1).stderr
    assert says in said and "launcher.timeout" in said


def test_a_signal_on_one_machine_stops_and_saves_on_all(base: Path, tmp_path: Path) -> None:
    folder = user(tmp_path / "user", base)
    endless = ["training.max_steps=100000", "training.eval_strategy=no", "training.save_strategy=no"]
    machines = start([folder, folder], *endless)
    log, deadline = folder / "run/log.jsonl", time.monotonic() + 200
    while not log.exists() or not log.read_text().strip():
        assert machines[1].poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    machines[1].send_signal(signal.SIGTERM)
    first, _ = finish(machines, code=143)
    assert "another machine was asked to stop: stopped by SIGTERM after step" in first
    assert len(list((folder / "run").glob("checkpoint-*/manifest.json"))) == 1
