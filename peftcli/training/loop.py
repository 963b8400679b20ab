"""The training loop, on `accelerate.Accelerator`.

A step is a window of `gradient_accumulation_steps` batches on each process. Its loss is the sum over all supervised
tokens of the window, on all processes, divided by their number; so 1x8, 2x4 and 8x1 (batch x accumulation), one process
or several, give the same gradient, in a short last window too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch  # noqa: TID253
from accelerate.utils import set_seed  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters.engine import attached_to, user_model
from peftcli.adapters.steps import add_regularization, after_step, begin_training, follows_steps
from peftcli.data.tokens import TokenDataset
from peftcli.recipe.task_rules import higher_is_better
from peftcli.recipe.training_section import TrainingSection
from peftcli.training import resume, state
from peftcli.training.batches import Window, to_batch, training_windows
from peftcli.training.callbacks import Callback
from peftcli.training.evaluate import evaluate, gathered
from peftcli.training.feed import Feed, MakeWindows
from peftcli.training.finite import not_finite
from peftcli.training.losses import CausalLMLoss
from peftcli.training.objectives.base import Objective
from peftcli.training.optimizers import build_optimizer, build_scheduler
from peftcli.training.progress import peak_memory
from peftcli.training.reports import Outcome, StepReport
from peftcli.training.schedule import total_steps
from peftcli.training.signals import Interrupted
from peftcli.training.sparing import kept_activations
from peftcli.training.strategies.plain import Strategy


def checkpoint_activations(model: Any) -> None:
    """Recompute each layer in the backward pass.

    Not the reentrant way, which needs inputs that require gradients: those would carry gradients through all layers
    before the first adapted one.
    """
    # Later versions of transformers 5 know it by the first name and warn at the second.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def uses_autocast(model: nn.Module, settings: TrainingSection) -> bool:
    """Whether `bf16` has something to do: a model whose matrices are in bfloat16 already computes in it."""
    return settings.bf16 and any(p.dtype == torch.float32 for p in model.parameters() if p.dim() > 1)


class Trainer:
    """Trains the parameters of `model` that require gradients.

    Args:
        model: adapted or not.
        train_data: what it learns, or of a stream its first samples.
        settings: the recipe's `training` section.
        folder: the run folder; checkpoints go there.
        strategy: how the model is spread over the processes.
        objective: what is trained for; makes of a model the module that gives its loss.
        eval_data: what decides which step is the best.
        pad_token_id: fills rows up; any id does.
        callbacks: what happens around the loop; their states are saved with the first process's.
        export: writes the finished form of the adapter into a checkpoint, for other programs to load.
        received_signal: gives the number of a signal that asks to stop, or 0.
        published_step: the step whose finished form an earlier run has written; resumed from there, nothing is left.
        manifest: further entries for the checkpoints' manifests.
        feed: makes windows of the training data; see `Feed`.
        row_length: pack samples into rows of so many tokens; a batch is then rows, not samples.
        identity: by recipe field, what else a resumed run must share with the one it continues.
    """

    def __init__(
        self,
        model: nn.Module,
        train_data: TokenDataset,
        settings: TrainingSection,
        folder: Path,
        *,
        strategy: Strategy,
        objective: Callable[..., Objective] = CausalLMLoss,
        eval_data: TokenDataset | None = None,
        pad_token_id: int = 0,
        callbacks: Sequence[Callback] = (),
        export: Callable[[Path], None] | None = None,
        received_signal: Callable[[], int] = lambda: 0,
        feed: Callable[[TokenDataset, MakeWindows], Feed] = Feed,
        row_length: int | None = None,
        published_step: int | None = None,
        manifest: dict[str, Any] | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.train_data, self.eval_data = model, train_data, eval_data
        self._objective = objective
        self.settings, self.folder, self.strategy = settings, folder, strategy
        self.accelerator = accelerator = strategy.accelerator
        self.pad_token_id, self.callbacks, self.export = pad_token_id, callbacks, export
        self.received_signal, self.published_step = received_signal, published_step
        self.manifest, self.identity = manifest or {}, identity or {}
        self.world_size, self.rank = accelerator.num_processes, accelerator.process_index
        self.row_length = row_length
        self.metric: str = settings.metric_for_best_model
        self.progress = state.Progress()
        self.stopped: str | None = None
        self._began, self._logged_at, self._logged_tokens = 0.0, 0.0, 0
        self.feed = feed(train_data, self._make_windows)
        self.total_steps = total_steps(settings, self.feed.steps_per_epoch)
        self._prepare()

    def _make_windows(self, data: TokenDataset, order: int) -> list[Window]:
        return training_windows(
            data, self.settings, order, world_size=self.world_size, rank=self.rank, row_length=self.row_length
        )

    def _prepare(self) -> None:
        if self.settings.gradient_checkpointing:
            checkpoint_activations(self.model)
        self.adapters = attached_to(user_model(self.model))
        begin_training(self.adapters, self.total_steps)
        self._follows_steps = follows_steps(self.adapters)
        self._bare_loss = self._objective(
            self.model, bf16=uses_autocast(self.model, self.settings), packed=self.row_length is not None
        )
        self.strategy.prepare(
            self.model,
            self._bare_loss,
            lambda: build_optimizer(self.model, self.settings),
            keep_gradients=self._follows_steps,
        )
        # Not prepared by Accelerate, which would take one schedule step for each process.
        self.scheduler = build_scheduler(self.strategy.optimizer, self.settings, self.total_steps)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def train(self, checkpoint: Path | None = None) -> Outcome:
        """Run to the last step, or to whatever stops the run before.

        Args:
            checkpoint: where to continue from.

        Raises:
            RunError: the loss or a gradient is not finite, or a checkpoint could not be written.
            Interrupted: a signal came; a checkpoint was written.
            InputError: the checkpoint is not this run's.
        """
        set_seed(self.settings.seed, device_specific=True)
        if checkpoint is not None:
            resume.load(self, checkpoint)
        resume.require_room(self)
        try:
            self._call("on_train_begin")
            self.model.train()
            self._logged_at, self._logged_tokens = time.perf_counter(), self.progress.tokens
            self._began = self._logged_at - self.progress.seconds
            checkpointing, sharded = self.settings.gradient_checkpointing, self.strategy.shards_base
            with kept_activations(self.model, checkpointing=checkpointing, sharded=sharded):
                for window in self._remaining_windows():
                    signal_number = self._step(window)
                    self._after_step(signal_number)
        finally:
            self._bare_loss.release()
            self._call("on_train_end")
        if self.settings.load_best_model_at_end and self.progress.best_step is not None:
            resume.load_best(self)
        return Outcome(
            steps=self.progress.step,
            best_step=self.progress.best_step,
            best_metrics=self.progress.best_metrics,
            metrics=self.progress.metrics,
            tokens=self.progress.tokens,
            stopped=self.stopped,
            seconds=self.progress.seconds,
        )

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or something has stopped the run for good."""
        return self.progress.step >= self.total_steps or self.stopped is not None

    def stop(self, reason: str) -> None:
        """End training after this step (callbacks call it)."""
        self.stopped = reason

    def is_better(self, value: float, than: float, threshold: float = 0.0) -> bool:
        """Whether a value of the metric beats another by more than `threshold`."""
        if higher_is_better(self.metric):
            return value > than + threshold
        return value < than - threshold

    def _remaining_windows(self) -> Iterator[Window]:
        """The windows from where the run stands to its last step, over the epochs."""
        while not self.finished:
            for window in self.feed.windows(self.progress)[self.progress.window :]:
                if self.finished:
                    return
                yield window

    def _step(self, window: Window) -> int:
        """Forward and backward over the window's batches, then one optimizer step.

        Returns:
            The signal any process received, or 0.
        """
        indices = [index for batch in window for index in batch]
        labels = int(self._gather([float(self.feed.units[indices].sum())]).sum())
        losses = []
        for number, batch in enumerate(window, start=1):
            last = number == len(window)
            with self.strategy.batch(last=last):
                loss = self.strategy.loss(self._batch(self.feed.data, batch))
                # Processes average their gradients; the loss is a sum over all of them.
                share = loss * (self.world_size / labels)
                self.strategy.backward(add_regularization(self.adapters, share) if last else share)
            losses.append(loss.detach())
        self._bare_loss.release()
        norm = self.strategy.gradient_norm()
        local_loss = float(torch.stack(losses).sum())
        sums = self._gather([local_loss, float(self.feed.lengths[indices].sum()), self.received_signal()])
        loss_sum, tokens = float(sums[:, 0].sum()), int(sums[:, 1].sum())
        if not (math.isfinite(loss_sum) and math.isfinite(norm)):
            raise not_finite(self, window, losses)
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.strategy.step(norm, self.settings.max_grad_norm)
        if self._follows_steps:
            with self.strategy.whole(gradients=True, write=True):
                after_step(self.adapters, self.progress.step + 1)
        self.strategy.zero_grad()
        self.scheduler.step()
        self._advance(loss_sum, labels, tokens)
        self._report(learning_rate, float(norm))
        return int(sums[:, 2].max())

    def _advance(self, loss_sum: float, labels: int, tokens: int) -> None:
        progress = self.progress
        progress.step += 1
        self.feed.advance(progress)
        progress.tokens += tokens
        progress.loss_sum += loss_sum
        progress.label_count += labels

    def _report(self, learning_rate: float, norm: float) -> None:
        progress, now = self.progress, time.perf_counter()
        progress.seconds = now - self._began
        report = StepReport(
            step=progress.step,
            epoch=self.feed.epoch(progress),
            loss=progress.loss_sum / progress.label_count,
            lr=learning_rate,
            grad_norm=norm,
            tokens=progress.tokens,
            tokens_per_second=round((progress.tokens - self._logged_tokens) / max(now - self._logged_at, 1e-9), 1),
            memory=peak_memory(),
        )
        self._call("on_step", report)
        if progress.step % self.settings.logging_steps == 0 or progress.step == self.total_steps:
            self._call("on_log", report.row())
            progress.loss_sum, progress.label_count = 0.0, 0
            self._logged_at, self._logged_tokens = now, progress.tokens

    def _after_step(self, signal_number: int) -> None:
        """Evaluate, save, stop: whatever is due."""
        settings, last = self.settings, self.progress.step >= self.total_steps
        improved = False
        if self.eval_data is not None and (last or self._due(settings.eval_strategy, settings.eval_steps)):
            improved = self._evaluate_and_compare()
        last = self.finished
        keep_best = improved and settings.load_best_model_at_end
        if signal_number or last or keep_best or self._due(settings.save_strategy, settings.save_steps):
            resume.save(self)
        if signal_number and not last:
            raise Interrupted(signal_number, after=self.progress.step)

    def _due(self, strategy: str, every: int) -> bool:
        if strategy == "epoch":
            return self.progress.window == 0
        return strategy == "steps" and self.progress.step % every == 0

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, data: TokenDataset) -> dict[str, float]:
        """Mean loss, and what else the task is judged by."""
        return evaluate(
            self.strategy.scoring,
            self._bare_loss.metrics,
            data,
            batch_size=self.settings.per_device_eval_batch_size,
            pad_token_id=self.pad_token_id,
            accelerator=self.accelerator,
        )

    def _evaluate_and_compare(self) -> bool:
        """Evaluate, tell the callbacks, and say whether this is the best step so far."""
        assert self.eval_data is not None
        began, progress = time.perf_counter(), self.progress
        progress.metrics = self.evaluate(self.eval_data)
        self._logged_at += time.perf_counter() - began  # evaluation doesn't count against tokens a second
        best = progress.best_metrics
        improved = best is None or self.is_better(progress.metrics[self.metric], best[self.metric])
        if improved:
            progress.best_step, progress.best_metrics = progress.step, progress.metrics
        self._call("on_log", {"step": progress.step, **progress.metrics})
        self._call("on_evaluate", progress.metrics)
        return improved

    # -- details ------------------------------------------------------------------------------------------------------

    def _batch(self, data: TokenDataset, indices: list[int]) -> dict[str, Tensor]:
        return to_batch(data, indices, self.pad_token_id, self.accelerator.device)

    def _gather(self, values: Sequence[float]) -> Tensor:
        return gathered(self.accelerator, values)

    def _call(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)
