"""The loop: accumulation identity, resume, best step, early stopping, signals, non-finite numbers."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from peftcli.data.tokens import TokenDataset
from peftcli.errors import InputError, RunError
from peftcli.training.batches import evaluation_batches, training_windows
from peftcli.training.callbacks import EarlyStopping, JsonLog, read_log
from peftcli.training.checkpoints import checkpoints, find_checkpoint
from peftcli.training.loop import Trainer
from peftcli.training.signals import Interrupted
from training.tiny import Recorder, random_data, settings, tiny_llama, trainer


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# -- accumulation -------------------------------------------------------------------------------------------------------


def first_gradient(folder: Path, data: TokenDataset, batch: int, accumulation: int) -> dict[str, torch.Tensor]:
    """What one step of SGD without clipping moved each tensor by, in float64."""
    model = tiny_llama().double()
    before = weights(model)
    run = trainer(
        folder, model, train_data=data, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0,
        group_by_length=False,
    )  # fmt: skip
    run.train()
    return {name: before[name] - after for name, after in weights(model).items()}


@pytest.mark.parametrize("samples", [8, 5])  # 5: a short window
def test_accumulation_does_not_change_the_gradient(tmp_path: Path, samples: int) -> None:
    data = random_data(samples)
    reference = first_gradient(tmp_path, data, 8, 1)
    for batch, accumulation in ((1, 8), (2, 4), (4, 2)):
        ours = first_gradient(tmp_path, data, batch, accumulation)
        for name, expected in reference.items():
            torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-12)


def test_gradient_is_that_of_the_mean_over_labels(tmp_path: Path) -> None:
    data = random_data(8)
    ours = first_gradient(tmp_path, data, 2, 4)
    model = tiny_llama().double()
    loss, count = torch.zeros((), dtype=torch.float64), 0
    for ids, supervised in (data[index] for index in range(len(data))):
        tokens = torch.from_numpy(ids).long()
        wanted = torch.from_numpy(supervised[1:])
        logits = model(tokens[None]).logits[0, :-1]
        loss = loss + nn.functional.cross_entropy(logits[wanted], tokens[1:][wanted], reduction="sum")
        count += int(wanted.sum())
    (loss / count).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("group_by_length", [True, False])
def test_an_epoch_sees_every_sample_once(group_by_length: bool) -> None:
    data = random_data(23)
    chosen = settings(per_device_train_batch_size=2, gradient_accumulation_steps=3, group_by_length=group_by_length)
    windows = training_windows(data, chosen, 0)
    assert [len(window) for window in windows] == [3, 3, 3, 3]
    assert sorted(index for window in windows for batch in window for index in batch) == list(range(23))
    assert training_windows(data, chosen, 1) != windows


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_sample_once(world_size: int) -> None:
    parts = [evaluation_batches(range(7), 2, world_size=world_size, rank=rank) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(index for part in parts for batch in part for index in batch) == list(range(7))


# -- resume -------------------------------------------------------------------------------------------------------------


def dropout_llama() -> nn.Module:
    return tiny_llama(attention_dropout=0.2)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
@pytest.mark.parametrize("stop_at", [1, 5, 6])  # in the first epoch, in the second, at its end
def test_resume_is_bit_identical(tmp_path: Path, stop_at: int, optim: str) -> None:
    values: dict[str, Any] = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 3.0, "optim": optim,
        "save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "logging_steps": 2, "eval_steps": 3,
        "eval_data": random_data(5, seed=1),
    }  # fmt: skip
    whole, recorder = dropout_llama(), Recorder()
    trainer(tmp_path / "whole", whole, callbacks=[recorder], **values).train()

    def received() -> int:
        return signal.SIGTERM if first.progress.step == stop_at - 1 else 0

    part, seen = dropout_llama(), Recorder()
    first = trainer(tmp_path / "parts", part, callbacks=[seen], received_signal=received, **values)
    with pytest.raises(Interrupted) as stopped:
        first.train()
    assert stopped.value.exit_code == 143
    rest, later = dropout_llama(), Recorder()
    with torch.no_grad():
        for parameter in rest.parameters():
            parameter.zero_()  # nothing but the checkpoint may matter
    second = trainer(tmp_path / "parts", rest, callbacks=[later], **values)
    second.train(find_checkpoint(tmp_path / "parts", "auto").folder)
    assert seen.rows + later.rows == recorder.rows
    assert_equal(weights(rest), weights(whole))


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    values = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, **values).train()
    checkpoint = tmp_path / "checkpoint-1"
    changed = [
        ({"per_device_train_batch_size": 4}, "training.per_device_train_batch_size"),
        ({"seed": 1}, "training.seed"),
        ({"optim": "sgd"}, "training.optim"),
        ({"train_data": random_data(seed=5)}, "data.train"),
    ]
    for change, field in changed:
        with pytest.raises(InputError, match=field):
            trainer(tmp_path, **{**values, **change}).train(checkpoint)
    run = trainer(tmp_path, **values)
    run.world_size = 2
    with pytest.raises(InputError, match="processes: was 1, is 2"):
        run.train(checkpoint)
    with pytest.raises(InputError, match=r"lm_head.weight: is \[97, 16\] torch.float32, not \[97, 24\]"):
        trainer(tmp_path, tiny_llama(hidden_size=24), **values).train(checkpoint)


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    values = {"max_steps": 2, "save_strategy": "steps", "lr_scheduler_type": "constant"}
    trainer(tmp_path, **values).train()
    with pytest.raises(InputError, match="nothing is left to train"):
        trainer(tmp_path, published_step=2, **values).train(tmp_path / "checkpoint-2")
    outcome = trainer(tmp_path, published_step=2, **{**values, "max_steps": 3}).train(tmp_path / "checkpoint-2")
    assert outcome.steps == 3


def test_log_file_continues_at_the_checkpoint(tmp_path: Path) -> None:
    values = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, callbacks=[JsonLog(tmp_path)], **values).train()
    whole = read_log(tmp_path / "log.jsonl")
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    trainer(tmp_path, callbacks=[JsonLog(tmp_path)], **values).train(tmp_path / "checkpoint-2")
    again = read_log(tmp_path / "log.jsonl")
    assert [(row["step"], row["loss"]) for row in again] == [(row["step"], row["loss"]) for row in whole]
    assert [row["step"] for row in again] == [1, 2, 3, 4]


# -- best step, early stopping, rotation ----------------------------------------------------------------------------------


class Scripted(Trainer):
    """A trainer whose evaluations give written values."""

    values: list[float]

    def evaluate(self, data: TokenDataset) -> dict[str, float]:
        return {"eval_loss": self.values.pop(0), "eval_perplexity": 1.0, "eval_token_accuracy": 0.0}


def scripted(folder: Path, losses: list[float], **values: Any) -> Scripted:
    run = trainer(folder, eval_data=random_data(2), eval_steps=1, max_steps=len(losses), **values)
    run.__class__ = Scripted
    run.values = list(losses)
    return run


def test_best_step_is_kept_and_loaded(tmp_path: Path) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Watch(Recorder):
        def on_step(self, trainer: Trainer, report: Any) -> None:
            seen[report.step] = weights(trainer.model)

    run = scripted(
        tmp_path, [3, 2, 4, 5, 6, 7], load_best_model_at_end=True, save_strategy="steps", save_steps=1,
        save_total_limit=2, callbacks=[Watch()],
    )  # fmt: skip
    outcome = run.train()
    assert (outcome.best_step, outcome.steps) == (2, 6)
    assert outcome.best_metrics is not None
    assert outcome.best_metrics["eval_loss"] == 2
    assert_equal(weights(run.model), seen[2])
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-5", "checkpoint-2"]


def test_the_best_is_saved_even_between_saves(tmp_path: Path) -> None:
    run = scripted(tmp_path, [3, 1, 4], load_best_model_at_end=True)
    assert run.train().best_step == 2
    assert (tmp_path / "checkpoint-2").is_dir()


@pytest.mark.parametrize(("threshold", "steps"), [(0.0, 5), (0.5, 4)])
def test_early_stopping(tmp_path: Path, threshold: float, steps: int) -> None:
    run = scripted(tmp_path, [3, 2, 1.9, 2, 2, 2, 2], callbacks=[EarlyStopping(2, threshold)])
    outcome = run.train()
    assert outcome.steps == steps
    assert outcome.stopped == "eval_loss has not improved in 2 evaluations"


def test_evaluation_is_the_mean_over_labels(tmp_path: Path) -> None:
    data, run = random_data(7), trainer(tmp_path, per_device_eval_batch_size=3)
    metrics = run.evaluate(data)
    one_by_one = trainer(tmp_path, run.model, per_device_eval_batch_size=1).evaluate(data)
    assert metrics == pytest.approx(one_by_one, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert run.model.training


@pytest.mark.parametrize(("strategy", "expected"), [("no", [6]), ("epoch", [2, 4, 6]), ("steps", [4, 6])])
def test_when_to_save_and_evaluate(tmp_path: Path, strategy: str, expected: list[int]) -> None:
    recorder = Recorder()
    trainer(
        tmp_path, callbacks=[recorder], eval_data=random_data(2), per_device_train_batch_size=12, num_train_epochs=3.0,
        save_strategy=strategy, save_steps=4, eval_strategy=strategy, eval_steps=4, save_total_limit=None,
    ).train()  # fmt: skip
    assert [row["step"] for row in recorder.rows if "eval_loss" in row] == expected
    assert sorted(int(path.name[11:]) for path in checkpoints(tmp_path)) == expected


@pytest.mark.parametrize(("metric", "higher_is_better"), [("eval_loss", False), ("eval_token_accuracy", True)])
def test_which_way_is_better(tmp_path: Path, metric: str, higher_is_better: bool) -> None:
    run = trainer(tmp_path, metric_for_best_model=metric)
    assert run.is_better(0.8, 0.5) == higher_is_better
    assert run.is_better(0.5, 0.8) != higher_is_better
    assert not run.is_better(0.5, 0.5)
    assert not run.is_better(0.8, 0.5, threshold=0.4) and not run.is_better(0.5, 0.8, threshold=0.4)


def test_fractional_epochs(tmp_path: Path) -> None:
    assert trainer(tmp_path, per_device_train_batch_size=6, num_train_epochs=1.5).train().steps == 6


# -- signals, non-finite numbers ------------------------------------------------------------------------------------------


def test_nan_stops_before_anything_is_changed_or_saved(tmp_path: Path) -> None:
    model = tiny_llama()
    run = trainer(tmp_path, model, save_strategy="steps", save_steps=1, per_device_train_batch_size=2,
                  gradient_accumulation_steps=3, max_steps=3)  # fmt: skip
    poisoned = training_windows(run.train_data, run.settings, 0)[1][2]
    original = Trainer._batch

    def poison(self: Trainer, data: TokenDataset, indices: list[int]) -> dict[str, torch.Tensor]:
        batch = original(self, data, indices)
        if indices == poisoned:
            with torch.no_grad():
                model.model.norm.weight.fill_(math.nan)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_batch", poison)
        with pytest.raises(RunError) as failure:
            run.train()
    numbers = ", ".join(map(str, poisoned))
    assert f"step 2: the loss or its gradient is not finite: batch 3 of process 0 (samples {numbers})" in str(
        failure.value
    )
    assert failure.value.exit_code == 1
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]


def test_infinite_gradient_is_named(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(RunError, match=r"the gradient of model.layers.1.mlp.up_proj.weight is not finite"):
        trainer(tmp_path, model, max_steps=1).train()


def test_a_signal_at_the_last_step_finishes_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2, received_signal=lambda: signal.SIGTERM * (run.progress.step == 1))
    assert run.train().steps == 2


# -- settings that change how, not what -------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    """Also with a frozen embedding, where the reentrant kind would lose the gradient."""
    results = []
    for checkpointing in (False, True):
        model = dropout_llama()
        model.model.embed_tokens.requires_grad_(False)
        trainer(tmp_path, model, gradient_checkpointing=checkpointing, max_steps=2).train()
        results.append(weights(model))
    assert_equal(*results)


def test_clipping_scales_the_whole_gradient(tmp_path: Path) -> None:
    moved = []
    for limit in (0.0, 0.01):
        model = tiny_llama()
        before, recorder = weights(model), Recorder()
        trainer(tmp_path, model, callbacks=[recorder], max_steps=1, optim="sgd", learning_rate=1.0,
                lr_scheduler_type="constant", max_grad_norm=limit).train()  # fmt: skip
        moved.append(torch.cat([(before[name] - after).flatten() for name, after in weights(model).items()]))
    norm = recorder.rows[0]["grad_norm"]
    assert norm > 0.01
    torch.testing.assert_close(moved[1], moved[0] * 0.01 / norm, rtol=1e-3, atol=1e-6)


def test_bf16_autocast_only_for_float32(tmp_path: Path) -> None:
    run = trainer(tmp_path, bf16=True, max_steps=1)
    assert run.strategy.scoring.bf16
    run.train()
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert not trainer(tmp_path, tiny_llama().bfloat16(), bf16=True).strategy.scoring.bf16


def test_training_learns(tmp_path: Path) -> None:
    data = random_data(4)
    model = tiny_llama()
    run = trainer(tmp_path, model, train_data=data, eval_data=data, learning_rate=1e-2, num_train_epochs=60.0)
    outcome = run.train()
    assert outcome.metrics["eval_loss"] < 0.1
    assert outcome.metrics["eval_token_accuracy"] == 1.0


def test_same_seed_same_run(tmp_path: Path) -> None:
    results = []
    for name in "ab":
        model = dropout_llama()
        torch.manual_seed(ord(name))
        np.random.seed(ord(name))
        trainer(tmp_path / name, model, max_steps=3).train()
        results.append(weights(model))
    assert_equal(*results)
