"""Every file of a checkpoint damaged in every way: never taken for whole, passed over and said, and the run still ends right."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training.tiny import random_data, trainer

from faults.nursery import RESUME, Nursery, outcome
from peftcli.errors import InputError, RunError
from peftcli.training.callbacks import Callback
from peftcli.training.checkpoints import damage, find_checkpoint
from peftcli.training.loop import Trainer
from peftcli.training.reports import StepReport


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << (at % 8)
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "first bit": lambda path: flip(path, 0),
    "a bit": lambda path: flip(path, path.stat().st_size // 3),
    "last bit": lambda path: flip(path, path.stat().st_size - 1),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}
FILES = (
    "manifest.json", "trainer.json", "trainable.safetensors", "optimizer.safetensors", "adapter_config.json",
    "adapter_model.safetensors", "base_fingerprint.json", "README.md",
)  # fmt: skip


@pytest.fixture(scope="module")
def stopped(nursery: Nursery, place: Path, whole: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed where it has two checkpoints, the second not yet the last."""
    for share in (0.5, 0.55, 0.6, 0.45, 0.65, 0.7):
        shutil.rmtree(place / "run", ignore_errors=True)
        nursery.peft(place, *RESUME, event=round(share * whole["events"]))
        if len(list((place / "run").glob("checkpoint-*"))) >= 2:
            break
    kept = tmp_path_factory.mktemp("stopped") / "run"
    shutil.copytree(place / "run", kept)
    return kept


def newest(run: Path) -> Path:
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))


def test_every_damage_to_every_file_is_seen(stopped: Path, tmp_path: Path) -> None:
    files = {path.name for path in newest(stopped).iterdir()}
    assert files == set(FILES)
    for name in FILES:
        for kind, harm in DAMAGES.items():
            run = tmp_path / f"{name} {kind}"
            shutil.copytree(stopped, run)
            bad = newest(run)
            harm(bad / name)
            assert damage(bad) is not None, (name, kind)
            found = find_checkpoint(run, "auto")
            assert found.folder is not None and found.folder != bad, (name, kind)
            assert [path for path, _ in found.skipped] == [bad]
            # A bit of the manifest may be one of another file's hash.
            assert name in found.skipped[0][1] or name == "manifest.json", (name, kind)
            with pytest.raises(InputError, match=r"can't be resumed from"):
                find_checkpoint(run, str(bad))
            shutil.rmtree(run)


def finish(nursery: Nursery, place: Path, stopped: Path, whole: dict[str, Any], name: str, kind: str) -> None:
    """Damage the newest checkpoint and resume: it is passed over, and the run ends as the whole one did."""
    shutil.rmtree(place / "run", ignore_errors=True)
    shutil.copytree(stopped, place / "run")
    bad = newest(place / "run")
    DAMAGES[kind](bad / name)
    done = nursery.peft(place, *RESUME)
    assert done["code"] == 0, (name, kind, done["err"])
    assert f"passed over {bad.name}: {'' if name == 'manifest.json' else name}" in done["out"]
    left = outcome(place / "run")
    assert left == {part: whole[part] for part in left}, (name, kind)


def test_a_damaged_checkpoint_is_passed_over(
    nursery: Nursery, place: Path, stopped: Path, whole: dict[str, Any]
) -> None:
    finish(nursery, place, stopped, whole, "optimizer.safetensors", "a bit")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_passed_over(
    name: str, nursery: Nursery, place: Path, stopped: Path, whole: dict[str, Any]
) -> None:
    for kind in DAMAGES:
        finish(nursery, place, stopped, whole, name, kind)


def test_a_damaged_best_checkpoint_is_not_taken_as_the_result(stopped: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "eval_data": random_data(5), "load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1,
        "eval_steps": 1, "learning_rate": 1e-3,
    }  # fmt: skip

    class Harm(Callback):
        def on_step(self, trainer: Trainer, report: StepReport) -> None:
            for path in tmp_path.glob("checkpoint-1/trainable.safetensors"):
                flip(path, 500)

    run = trainer(tmp_path, callbacks=[Harm()], **{**values, "max_steps": 2})
    run.is_better = lambda *_: False  # type: ignore[method-assign]  # so that the first stays the best
    with pytest.raises(RunError, match=r"checkpoint-1, the best step.*trainable.safetensors has changed"):
        run.train()
