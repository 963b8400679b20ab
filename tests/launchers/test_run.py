"""Real processes under a real launcher, with a small stand-in for the worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peftcli.errors import InputError, RunError
from peftcli.launchers import command as commands
from peftcli.launchers.run import run
from peftcli.recipe.schema import LauncherSection

WORKER = """
import json, os, pathlib, signal, sys, time
folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
(folder / f"seen-{rank}.json").write_text(json.dumps({"argv": sys.argv[1:], "world": world, **os.environ}))
if how == "fail" and rank == 1:
    (folder / "rank-1.log").write_text("Traceback ...\\nValueError: the second rank is unwell\\n")
    sys.exit(1)
if how == "wait":
    got = []
    signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    (folder / f"ready-{rank}").touch()
    while not got:
        time.sleep(0.05)
    time.sleep(0.5)  # a second signal would come now
    (folder / f".stopped-{rank}.json").write_text(json.dumps(got))
    os.replace(folder / f".stopped-{rank}.json", folder / f"stopped-{rank}.json")
    while len(list(folder.glob("stopped-*"))) < world:
        time.sleep(0.05)  # the launcher stops the others as soon as one leaves
    sys.exit(143)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder, the stand-in as the worker, and a default accelerate config that would break everything."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/stand_in_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(commands, "WORKER", "stand_in_worker")
    home = tmp_path / "hf"
    (home / "accelerate").mkdir(parents=True)
    (home / "accelerate/default_config.yaml").write_text("distributed_type: NO_SUCH_TYPE\nnum_processes: 77\n")
    monkeypatch.setenv("HF_HOME", str(home))
    run_folder = tmp_path / "run folder"
    run_folder.mkdir()
    return run_folder


def launch(folder: Path, how: str, *extra: str, count: int = 2) -> None:
    launcher = LauncherSection(type="accelerate", num_processes=count)
    run(commands.command(launcher, [str(folder), how], extra, base=os.environ), folder)


def seen(folder: Path) -> list[dict[str, str]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("seen-*.json"))]


def test_two_processes_on_the_cpu(folder: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` would silently start one."""
    launch(folder, "with blank")
    first, second = seen(folder)
    assert first["world"] == second["world"] == 2
    assert first["argv"] == [str(folder), "with blank"]
    assert first["ACCELERATE_MIXED_PRECISION"] == "no"


def test_one_process(folder: Path) -> None:
    launch(folder, "x", count=1)
    assert [item["world"] for item in seen(folder)] == [1]


def test_a_failing_rank_fails_the_run_with_its_words(folder: Path) -> None:
    with pytest.raises(RunError, match="rank 1 failed: ValueError: the second rank is unwell") as error:
        launch(folder, "fail")
    assert str(folder / "rank-1.log") in str(error.value) and error.value.exit_code == 1


def test_an_argument_the_launcher_does_not_know(folder: Path) -> None:
    with pytest.raises(InputError, match="after `--`: the launcher refused its arguments") as error:
        launch(folder, "x", "--no_such_option", "1")
    assert "no_such_option" in str(error.value)


@pytest.mark.skipif(not hasattr(signal, "SIGTERM") or sys.platform == "win32", reason="POSIX signals")
def test_sigterm_reaches_every_rank_once(folder: Path) -> None:
    script = (
        "import sys, os\n"
        "from peftcli.launchers import command as c\n"
        "from peftcli.launchers.run import run\n"
        "from pathlib import Path\n"
        "from peftcli.recipe.schema import LauncherSection\n"
        "from peftcli.errors import RunError\n"
        "c.WORKER = 'stand_in_worker'\n"
        "folder = Path(sys.argv[1])\n"
        "launcher = LauncherSection(type='accelerate', num_processes=2)\n"
        "try:\n    run(c.command(launcher, [str(folder), 'wait'], base=os.environ), folder)\n"
        "except RunError as error:\n    sys.exit(error.exit_code)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)])
    deadline = time.monotonic() + 120
    while len(list(folder.glob("ready-*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    assert [json.loads((folder / f"stopped-{rank}.json").read_text()) for rank in (0, 1)] == [[15], [15]]
