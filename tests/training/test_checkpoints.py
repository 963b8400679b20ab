"""A checkpoint is whole or not there, and what was damaged is never taken for whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peftcli.errors import InputError, RunError
from peftcli.training import state
from peftcli.training.checkpoints import (
    MANIFEST,
    _manifest,
    checkpoints,
    damage,
    find_checkpoint,
    move_files,
    new_checkpoint,
    rotate,
    sweep,
)

FILES = ("trainable.safetensors", "trainer.json", "adapter/adapter_config.json")


def write(run: Path, step: int) -> Path:
    with new_checkpoint(run, step, {"recipe": "0" * 64}) as folder:
        for name in FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{name} at {step}")
    return run / f"checkpoint-{step}"


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit": flip_bit,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


def test_a_checkpoint_verifies(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert damage(folder) is None
    assert (manifest["step"], manifest["recipe"]) == (7, "0" * 64)
    assert {entry["name"] for entry in manifest["files"]} == set(FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_seen_and_the_one_before_is_taken(tmp_path: Path, name: str, kind: str) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    DAMAGES[kind](bad / name)
    found = find_checkpoint(tmp_path, "auto")
    assert found.folder == good
    assert [path for path, _ in found.skipped] == [bad]
    assert name in found.skipped[0][1]
    with pytest.raises(InputError, match=Path(name).name):
        find_checkpoint(tmp_path, bad)


@pytest.mark.parametrize("kind", ["missing", "empty", "half", "not a manifest", "other format"])
def test_a_damaged_manifest_is_seen(tmp_path: Path, kind: str) -> None:
    manifest = write(tmp_path, 1) / MANIFEST
    if kind in DAMAGES:
        DAMAGES[kind](manifest)
    else:
        manifest.write_text({"not a manifest": "[1]", "other format": '{"format": 99, "files": []}'}[kind])
    with pytest.raises(InputError, match=r"checkpoint-1: manifest\.json"):
        find_checkpoint(tmp_path, "auto")


def test_a_manifest_cannot_reach_outside(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    folder = write(tmp_path, 1)
    facts = json.loads((folder / MANIFEST).read_text())
    del facts["sha256"]
    facts["files"][0]["name"] = "../outside"
    (folder / MANIFEST).write_bytes(_manifest(facts))
    assert damage(folder) == "manifest.json names a file outside the checkpoint"


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    manifest = write(tmp_path, 1) / MANIFEST
    whole = manifest.read_bytes()
    for at in range(len(whole)):
        manifest.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        assert damage(manifest.parent) is not None, whole[:at]


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "auto").folder is None


def test_an_earlier_checkpoint_does_not_mix_with_later_ones(tmp_path: Path) -> None:
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    assert find_checkpoint(tmp_path, second).folder == second
    with pytest.raises(InputError, match="later checkpoints would mix with the new ones: checkpoint-2"):
        find_checkpoint(tmp_path, first)
    assert find_checkpoint(tmp_path / "another run", first).folder == first
    with pytest.raises(InputError, match="is a run folder"):
        find_checkpoint(tmp_path, tmp_path)


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write(tmp_path, step)
    (tmp_path / "checkpoint-final").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]


def test_rotation_spares_the_best_and_the_newest(tmp_path: Path) -> None:
    for step in range(1, 7):
        write(tmp_path, step)
    rotate(tmp_path, 2, keep={6, 2})
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-5", "checkpoint-2"]
    rotate(tmp_path, None, keep=())
    assert len(checkpoints(tmp_path)) == 3


def test_a_second_checkpoint_of_a_step_replaces_the_first(tmp_path: Path) -> None:
    flip_bit(write(tmp_path, 3) / "trainer.json")
    assert damage(write(tmp_path, 3)) is None


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_checkpoint(tmp_path, 1, {}) as folder:
            state.save_tensors({"a": torch.ones(2)}, folder / "a.safetensors")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "checkpoint-1").iterdir()}
    assert modes == {0o640}


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=r"a holds values that are not finite"),
        new_checkpoint(tmp_path, 1, {}) as folder,
    ):
        state.save_tensors({"a": torch.tensor([1.0, torch.inf])}, folder / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError, match=r"No space left on device.*needs .* MB, .* MB are free"), \
         new_checkpoint(tmp_path, 1, {}, needed=1000) as folder:  # fmt: skip
        fill(folder)
    with pytest.raises(RunError, match=r"No space left on device"), new_checkpoint(tmp_path, 1, {}, needed=1 << 60):
        pytest.fail("started to write without room")
    assert list(tmp_path.iterdir()) == []


def test_stale_folders_of_dead_processes_are_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".tmp-5-{dead.pid}", f".tmp-6-{dead.pid}-old", f".tmp-5-{os.getpid()}", ".tmp-mine"]
    for name in names:
        (tmp_path / name).mkdir()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names[2:])


def test_files_move_with_the_config_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, order = tmp_path / "new", tmp_path / "run", []
    source.mkdir()
    target.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (source / name).write_text("new")
    (target / "README.md").write_text("old")
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    move_files(source, target)
    assert order[-1] == "adapter_config.json"
    assert {path.read_text() for path in target.iterdir()} == {"new"}


def test_every_file_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of fsync and rename calls: files, folder, manifest, folder, rename, parent."""
    calls: list[str] = []
    fsync, rename, opened = os.fsync, os.rename, {}
    real_open = os.open

    def watched_open(path: object, flags: int, *rest: int) -> int:
        descriptor = real_open(path, flags, *rest)
        opened[descriptor] = Path(str(path)).name
        return descriptor

    monkeypatch.setattr(os, "open", watched_open)
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(opened.get(fd, "?")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append("rename"), rename(a, b)))
    write(tmp_path, 1)
    temporary = f".tmp-1-{os.getpid()}"
    assert set(calls[:5]) == {"adapter_config.json", "trainable.safetensors", "trainer.json", "adapter", temporary}
    assert calls[5:] == [MANIFEST, temporary, "rename", tmp_path.name]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from training.test_checkpoints import write
run, at = Path({run!r}), {at}
write(run, 1)
done = 0
def watched(real):
    def call(*arguments):
        global done
        done += 1
        if done == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    return call
for name in ("fsync", "rename", "replace"):
    setattr(os, name, watched(getattr(os, name)))
write(run, 2)
"""


@pytest.mark.parametrize("at", [1, 4, 6, 8, 9])
def test_killed_at_any_moment(tmp_path: Path, at: int) -> None:
    """kill -9 before the n-th fsync or rename: the checkpoint before stands, or the new one is whole."""
    script = KILLED.format(tests=str(Path(__file__).parents[1]), run=str(tmp_path), at=at)
    subprocess.run([sys.executable, "-c", script], check=False)
    found = find_checkpoint(tmp_path, "auto")
    assert found.folder is not None
    assert found.folder.name == ("checkpoint-2" if at == 9 else "checkpoint-1")
    sweep(tmp_path)
    assert not list(tmp_path.glob(".tmp-*"))


def test_reading_back_catches_a_lying_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.safetensors"
    state.save_tensors({"a": torch.zeros(3)}, other)
    monkeypatch.setattr(state, "save_file", lambda tensors, path, metadata: shutil.copy(other, path))
    with pytest.raises(RunError, match="reads back different"):
        state.save_tensors({"a": torch.ones(3)}, tmp_path / "a.safetensors")
