"""Run by torchrun in test_distributed.py: everything that needs two real processes, results as JSON from the first."""

from __future__ import annotations

import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from peftcli.errors import RunError
from peftcli.training.signals import Interrupted
from training.tiny import Recorder, random_data, tiny_llama, trainer


def moved(folder: Path, samples: int, batch: int, accumulation: int, *, unused: int = 0) -> list[float]:
    """By how much one step of plain SGD moves the weights, in float64; `unused` ones, which no batch uses, stand in front."""
    model = tiny_llama().double()
    if unused:
        model.unused = nn.Parameter(torch.ones(unused, dtype=torch.double))
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    trainer(
        folder, model, train_data=random_data(samples), per_device_train_batch_size=batch, max_steps=1, optim="sgd",
        gradient_accumulation_steps=accumulation, learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0,
        group_by_length=False,
    ).train()  # fmt: skip
    return (before - nn.utils.parameters_to_vector(model.parameters()).detach()).tolist()


def resumed(folder: Path) -> dict[str, Any]:
    """Whether a run resumed at step 2 equals the whole one."""
    results, rows = [], []
    for checkpoint in (None, folder / "checkpoint-2"):
        model, recorder = tiny_llama(attention_dropout=0.2), Recorder()
        trainer(
            folder, model, callbacks=[recorder], eval_data=random_data(5), eval_steps=2, max_steps=4, save_steps=2,
            per_device_train_batch_size=2, save_strategy="steps",
        ).train(checkpoint)  # fmt: skip
        results.append(nn.utils.parameters_to_vector(model.parameters()))
        rows.append([row for row in recorder.rows if row["step"] > 2])
    return {"same weights": torch.equal(*results), "same log": rows[0] == rows[1], "rows": rows[0]}


def poisoned(folder: Path, rank: int) -> str:
    """The error of a run whose second process meets a NaN."""
    model = tiny_llama()
    run = trainer(folder, model, max_steps=1)
    if rank == 1:  # after the processes have agreed on the weights
        model.model.norm.weight.data.fill_(math.nan)
    try:
        run.train()
    except RunError as error:
        return str(error)
    return "no error"


def signalled(folder: Path, rank: int) -> int:
    """The exit code after a signal that only the second process received."""
    run = trainer(folder, max_steps=5, received_signal=lambda: signal.SIGTERM * (rank == 1 and run.progress.step == 1))
    try:
        run.train()
    except Interrupted as stopped:
        return stopped.exit_code
    return 0


def main(folder: Path) -> None:
    run = trainer(folder)
    assert run.world_size == 2
    results = {
        "accumulation": [moved(folder, samples, *shape) for samples in (8, 6, 5) for shape in ((4, 1), (2, 2), (1, 4))],
        "unused": [moved(folder, 8, *shape, unused=5) for shape in ((4, 1), (2, 2))],
        "resumed": resumed(folder / "resumed"),
        "poisoned": poisoned(folder, run.rank),
        "signalled": signalled(folder / "signalled", run.rank),
        "metrics": run.evaluate(random_data(5)),
    }
    if run.rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    run.accelerator.wait_for_everyone()  # a process that leaves early takes the other's connection along
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
