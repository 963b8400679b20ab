"""Writing a trainer into a checkpoint and back, and the proof that it is the same run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object  # noqa: TID253
from torch import Tensor  # noqa: TID253

from peftcli.errors import InputError, RunError
from peftcli.training import checkpoints, state
from peftcli.training.machines import first_says, seen_here

if TYPE_CHECKING:
    from peftcli.training.loop import Trainer

MUST_NOT_CHANGE = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "group_by_length", "seed", "data_seed",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps", "optim",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "loraplus_lr_ratio", "bf16",
)  # fmt: skip
"""Settings that a resumed run has to share with the one it continues."""

JSON_BYTES = 64 << 10  # manifest, settings, and the random states of a few processes


def save(trainer: Trainer) -> Path:
    """Write `checkpoint-<step>`, then delete those that `save_total_limit` leaves no room for.

    Raises:
        RunError: a tensor isn't finite, or the disk is full or fails. Nothing half-written is left.
    """
    progress = trainer.progress
    random_states = gather_object([state.random_states()])
    moments, plain = trainer.strategy.optimizer_state()
    with trainer.strategy.whole():
        if trainer.accelerator.is_main_process:
            _write(trainer, moments, plain, random_states)
    _rotate(trainer)
    trainer.accelerator.wait_for_everyone()
    return trainer.folder / f"checkpoint-{progress.step}"


def _write(
    trainer: Trainer, moments: dict[str, Tensor], plain: dict[str, Any], random_states: list[dict[str, Any]]
) -> None:
    """The first process's part of `save`."""
    trained = state.trained_tensors(trainer.model)
    content = {
        "progress": asdict(trainer.progress),
        "strategy": trainer.strategy.name,
        "identity": identity(trainer),
        "optimizer": plain,
        "scheduler": trainer.scheduler.state_dict(),
        "callbacks": {type(callback).__name__: callback.state_dict() for callback in trainer.callbacks},
        "random": random_states,
    }
    needed = _bytes((t.nbytes for t in trained.values()), (t.nbytes for t in moments.values()))
    with checkpoints.new_checkpoint(trainer.folder, trainer.progress.step, trainer.manifest, needed=needed) as folder:
        state.save_tensors(trained, folder / state.TRAINABLE)
        state.save_tensors(moments, folder / state.OPTIMIZER)
        state.write_trainer(folder, content)
        if trainer.export is not None:
            trainer.export(folder)


def _rotate(trainer: Trainer) -> None:
    """Delete the checkpoints there is no room for; never the best, never the one just verified."""
    progress = trainer.progress
    if trainer.accelerator.is_main_process:
        kept = {progress.step} if progress.best_step is None else {progress.step, progress.best_step}
        checkpoints.rotate(trainer.folder, trainer.settings.save_total_limit, kept)


def require_room(trainer: Trainer) -> None:
    """Refuse to begin a run whose checkpoints will not fit on the disk; each save looks again.

    Raises:
        RunError: with path, needed and free bytes.
    """
    if not trainer.accelerator.is_main_process:
        return
    settings = trainer.settings
    left = trainer.total_steps - trainer.progress.step
    every = {"steps": settings.save_steps, "epoch": trainer.feed.steps_per_epoch or left}.get(
        settings.save_strategy, left
    )
    saves = math.ceil(left / max(every, 1))
    # Besides those kept, the best, the one that is written before an older one goes, and the finished adapter.
    most = min(saves, settings.save_total_limit or saves) + settings.load_best_model_at_end + 1
    there = len(checkpoints.checkpoints(trainer.folder))
    trained = [tensor.nbytes for tensor in state.trained_tensors(trainer.model).values()]
    moments = 2 * sum(trained) if "adam" in settings.optim else 0
    checkpoints.require_room(trainer.folder, max(1, most - there), _bytes(trained) + moments)


def load(trainer: Trainer, folder: Path) -> None:
    """Bring a fresh trainer to where it stood when it wrote the checkpoint.

    Raises:
        InputError: the checkpoint is another run's, or nothing is left to train.
    """
    with seen_here(folder, trainer.folder) as here:
        content = state.read_trainer(here)
        state.require_same(content["identity"], identity(trainer), folder)
        progress = state.Progress(**content["progress"])
        with trainer.strategy.whole(write=True):
            state.load_trained(trainer.model, here)
        trainer.strategy.load_optimizer_state(here, content["optimizer"])
    trainer.scheduler.load_state_dict(content["scheduler"])
    best = trainer.folder / f"checkpoint-{progress.best_step}"
    needs_best = trainer.settings.load_best_model_at_end and progress.best_step is not None
    if needs_best and (reason := first_says(checkpoints.damage(best))):
        warnings.warn(f"{best}, the best step so far, is lost ({reason}); the best is sought anew", stacklevel=2)
        progress.best_step = progress.best_metrics = None
    trainer.progress = progress
    for callback in trainer.callbacks:
        callback.load_state_dict(content["callbacks"].get(type(callback).__name__, {}))
    for callback in trainer.callbacks:
        callback.on_resume(trainer)
    state.set_random_states(content["random"][trainer.rank])
    _rotate(trainer)  # the run may have been killed just before
    if trainer.finished and trainer.published_step == progress.step:
        raise InputError(
            f"has done {progress.step} of {trainer.total_steps} steps{_because(trainer.stopped)}: nothing is left to train",
            place=folder,
            fix="raise training.early_stopping_patience"
            if trainer.stopped
            else "raise training.num_train_epochs or training.max_steps",
        )


def _because(stopped: str | None) -> str:
    return f" ({stopped})" if stopped else ""


def load_best(trainer: Trainer) -> None:
    """Bring the model to its best step.

    Raises:
        RunError: that checkpoint is no longer what was written.
    """
    folder = trainer.folder / f"checkpoint-{trainer.progress.best_step}"
    if reason := first_says(checkpoints.damage(folder)):
        raise RunError(f"{folder}, the best step, can't be taken as the result: {reason}; --resume auto seeks another")
    with seen_here(folder, trainer.folder) as here, trainer.strategy.whole(write=True):
        state.load_trained(trainer.model, here)


def _bytes(trained: Iterable[int], moments: Iterable[int] = ()) -> int:
    """Of a checkpoint: trained tensors twice, as they are and in the adapter's own form, the optimizer's, and JSON."""
    return 2 * sum(trained) + sum(moments) + JSON_BYTES


def identity(trainer: Trainer) -> dict[str, Any]:
    """What a resumed run must share with this one."""
    settings = trainer.settings.model_dump(mode="json")
    data = trainer.train_data
    return {
        **trainer.identity,
        **{f"training.{name}": settings[name] for name in MUST_NOT_CHANGE},
        "processes": trainer.world_size,
        "data.packing": f"bfd, rows of {trainer.row_length} tokens" if trainer.row_length else None,
        "data.train": state.fingerprint(*data.columns().values()),
    }
