"""The worker: reads the run folder, trains, and writes the finished adapter there.

Runs in the process of `peft train`, or in several under a launcher: `python -m peftcli.training.worker RUN_FOLDER`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import broadcast_object_list, set_seed  # noqa: TID253
from rich.console import Console
from torch import nn  # noqa: TID253

from peftcli import __version__, get_peft_model
from peftcli.adapters.config import TaskType
from peftcli.adapters.quantized import is_quantized
from peftcli.data.stream import Stream
from peftcli.data.tokens import TokenDataset
from peftcli.errors import EXIT_FAILURE, InputError, PeftCliError, printable
from peftcli.files import sha256
from peftcli.launchers.machines import machine_folder
from peftcli.launchers.run import INTERRUPTED
from peftcli.names import RECIPE
from peftcli.recipe.load import load_recipe
from peftcli.recipe.redact import redact
from peftcli.recipe.schema import Recipe
from peftcli.recipe.task_rules import task_of
from peftcli.report.plots import plot_losses
from peftcli.training import checkpoints, machines, state
from peftcli.training.base_checks import whole_number
from peftcli.training.batches import row_length
from peftcli.training.callbacks import (
    LOG_NAME,
    Callback,
    EarlyStopping,
    JsonLog,
    Trackers,
    read_log,
    require_trackers,
)
from peftcli.training.card import base_name, model_card
from peftcli.training.feed import Feed, StreamFeed
from peftcli.training.loop import Trainer
from peftcli.training.model import load_tokenizer, open_base
from peftcli.training.objectives.table import objective
from peftcli.training.progress import ProgressBar, peak_memory
from peftcli.training.publish import (
    Export,
    RunResult,
    exporter,
    probe_logits,
    probe_of,
    reload_difference,
)
from peftcli.training.reports import Outcome
from peftcli.training.signals import Interrupted, StopSignals
from peftcli.training.starts import start_from_data
from peftcli.training.strategies import make_strategy
from peftcli.training.strategies.plain import Strategy

PLOT_NAME = "loss.png"


def run(run_folder: Path, *, resume: str | None = None, console: Console | None = None) -> RunResult | None:
    """Train what `run_folder/recipe.yaml` says.

    Args:
        run_folder: holds `recipe.yaml` and `data/`, as `peft train` prepares them; a `machine_folder` on other
            machines than the first.
        resume: `auto`, or the folder of a checkpoint.
        console: where progress goes; stdout when None.

    Returns:
        The result on the first process, None on the others. It is also `result.json` in the run folder.

    Raises:
        InputError: something asked for can't be had, or the checkpoint isn't this run's.
        RunError: training or saving failed.
        Interrupted: a signal came; a checkpoint was written.
    """
    prepared = machine_folder(run_folder, machines.machine_rank())
    recipe = load_recipe(prepared / RECIPE, check_paths=False)
    require_trackers(recipe.training.report_to)
    rank = int(os.environ.get("RANK", "0"))
    rank_log = _rank_log(prepared, rank)
    with rank_log, checkpoints.disk_errors(run_folder), StopSignals() as signals:
        strategy = make_strategy(recipe, prepared)
        worker = _Worker(recipe, run_folder, strategy, console or Console())
        result = worker.run(resume, signals)
        strategy.accelerator.wait_for_everyone()  # a process that leaves early takes the others' connections along
        strategy.accelerator.end_training()
    return result


class _Worker:
    """One process of a run."""

    def __init__(self, recipe: Recipe, folder: Path, strategy: Strategy, console: Console) -> None:
        self.recipe, self.folder, self.strategy, self.console = recipe, folder, strategy, console
        self.device, self.is_main = strategy.accelerator.device, strategy.accelerator.is_main_process
        self.prepared = machine_folder(folder, machines.machine_rank())
        data = self.prepared / "data"
        self.report = json.loads((data / "audit.json").read_text(encoding="utf-8"))
        self.train_data = TokenDataset.load(data / "train.safetensors")
        held_out = data / "eval.safetensors"
        self.eval_data = TokenDataset.load(held_out) if held_out.is_file() else None

    def run(self, resume: str | None, signals: StopSignals) -> RunResult | None:
        machines.require_same(self._facts())
        checkpoint = self._checkpoint(resume)
        set_seed(self.recipe.training.seed)
        model = self._model()
        export = exporter(self.recipe, model)
        trainer = self._trainer(model, export, signals)
        self._say(self.strategy.describe())
        outcome = trainer.train(checkpoint)
        probe = probe_of(self.train_data, self.device)
        with self.strategy.forwarding():
            expected = probe_logits(model, probe)
        with self._temporary_folder(outcome.steps) as written:
            with self.strategy.whole():
                if written is not None:
                    export(written)
            # Two bases may not fit into memory together: this one goes, with gradients and moments.
            del model, export, trainer
            self.strategy.finish()
            gc.collect()  # modules and what they hold are in cycles, and nobody else collects them on the CPU
            folder = broadcast_object_list([written])[0] if self.strategy.shards_base else written
            if folder is None:
                return None
            alone = not self.strategy.shards_base
            with nullcontext(folder) if alone else machines.seen_here(folder, self.folder) as here:
                difference = reload_difference(self.strategy, self.recipe, here, probe, expected)
            return None if written is None else self._finish(outcome, written, difference)

    def _facts(self) -> dict[str, Any]:
        """What all machines must have alike. Paths may differ, and names of folders do."""
        data = {"data.train": self.train_data, "data.eval": self.eval_data}
        training = self.recipe.training.model_dump(mode="json", exclude={"output_dir", "run_name", "report_to"})
        return {
            **{name: state.fingerprint(*part.columns().values()) if part else None for name, part in data.items()},
            **{f"training.{name}": value for name, value in training.items()},
            **identity(self.recipe),
            **self.recipe.model_dump(mode="json", include={"preference"}),
            "data.packing": f"{self.recipe.data.packing}, rows of {self.recipe.data.max_length} tokens",
            "launcher.type": self.recipe.launcher.type,
            **{f"version of {name}": value for name, value in versions().items()},
            "processes on this machine": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        }

    def _temporary_folder(self, step: int) -> AbstractContextManager[Path | None]:
        """Where the first process writes what is finished; None for the others."""
        return checkpoints.temporary_folder(self.folder, step) if self.is_main else nullcontext()

    def _model(self) -> nn.Module:
        """The base with a fresh adapter, or with every weight trainable for the method `full`."""
        recipe = self.recipe
        base = self.strategy.load_base(recipe.model, recipe.quantization)
        if recipe.adapter.config is None:
            if any(is_quantized(module) for module in base.modules()):
                raise InputError("the base is stored quantised, and can't be trained in full", field="adapter.method")
            return base.requires_grad_()
        config = copy.deepcopy(recipe.adapter.config)
        config.task_type = TaskType(recipe.model.task_type)
        pad = self.report["pad_token_id"]
        config = start_from_data(base, config, self.train_data, recipe.training, pad, self.device)
        return get_peft_model(base, config, revision=recipe.model.revision)

    def _finish(self, outcome: Outcome, written: Path, difference: float) -> RunResult:
        """Put what was verified in its place, with card, plot and result."""
        quantization = self.recipe.quantization
        best = self.recipe.training.load_best_model_at_end and outcome.best_step is not None
        step = outcome.best_step if best and outcome.best_step is not None else outcome.steps
        metrics = outcome.best_metrics if best else outcome.metrics
        card = model_card(self.recipe, self.report, metrics, step)
        (written / "README.md").write_text(card, encoding="utf-8")
        plot_losses(read_log(self.folder / LOG_NAME), written / PLOT_NAME)
        checkpoints.move_files(written, self.folder)
        result = RunResult(
            folder=str(self.folder),
            steps=outcome.steps,
            step=step,
            metrics=metrics,
            verified=f"reloaded, max |dlogit| {difference:.2g}" if difference else "reloaded, max |dlogit| 0.0",
            difference=difference,
            quantization=quantization.model_dump(mode="json") if quantization else None,
            stopped=outcome.stopped,
            seconds=round(outcome.seconds, 3),
            tokens=outcome.tokens,
            memory=peak_memory(),
            plot=str(self.folder / PLOT_NAME),
        )
        result.save(self.folder)
        return result

    def _checkpoint(self, resume: str | None) -> Path | None:
        if self.is_main:
            checkpoints.sweep(self.folder)
        if resume is None:
            return None
        if machines.machine_rank() > 0:
            return machines.first_says(None)
        found = checkpoints.find_checkpoint(self.folder, resume)
        for path, reason in found.skipped:
            self._say(f"passed over {path.name}: {reason}")
        if found.folder is None:
            self._say("no checkpoint yet: starting from the beginning")
        else:
            self._say(f"continuing from {found.folder}")
            before = state.read_trainer(found.folder).get("strategy", self.strategy.name)
            if before != self.strategy.name:
                self._say(f"written under {before}: adapter, step and optimizer state go on under {self.strategy.name}")
        return machines.first_says(found.folder)

    def _trainer(self, model: nn.Module, export: Export, signals: StopSignals) -> Trainer:
        stream = self._stream() if self.recipe.data.streaming else None
        return Trainer(
            model,
            self.train_data,
            self.recipe.training,
            self.folder,
            strategy=self.strategy,
            objective=partial(objective, self.recipe),
            eval_data=self.eval_data,
            pad_token_id=self.report["pad_token_id"],
            callbacks=self._callbacks(),
            # The whole model is its own trained tensors already.
            export=export if self.recipe.adapter.config is not None else None,
            received_signal=lambda: signals.received,
            feed=Feed if stream is None else partial(StreamFeed, stream, self._say),
            row_length=row_length(self.recipe),
            published_step=machines.first_says(RunResult.published_step(self.folder)),
            manifest={"recipe": sha256(self.prepared / RECIPE), "versions": versions()},
            identity={**identity(self.recipe), **(stream.identity() if stream else {})},
        )

    def _stream(self) -> Stream:
        """The training data, which are read while the run goes on."""
        model = self.recipe.model
        vocab_size = whole_number(open_base(model).facts, "vocab_size")
        return Stream(
            self.recipe.data,
            load_tokenizer(model),
            task=task_of(self.recipe),
            labels=model.labels,
            vocab_size=vocab_size,
        )

    def _callbacks(self) -> list[Callback]:
        training = self.recipe.training
        callbacks: list[Callback] = []
        if training.early_stopping_patience is not None:
            callbacks.append(EarlyStopping(training.early_stopping_patience, training.early_stopping_threshold))
        if training.report_to:
            callbacks.append(Trackers(training.run_name or self.folder.name, training.model_dump(mode="json")))
        if self.is_main:
            callbacks += [JsonLog(self.folder), ProgressBar(self.console)]
        return callbacks

    def _say(self, text: str) -> None:
        if self.is_main:
            self.console.print(printable(redact(text), 1000), markup=False, highlight=False)


def identity(recipe: Recipe) -> dict[str, Any]:
    """What of model and adapter has to stay as it was when a run is resumed. A base folder may have moved."""
    values = recipe.model_dump(mode="json")
    model = {**values["model"], "name_or_path": base_name(recipe)}
    fields = {"model": model, "adapter": values["adapter"]}
    found = {f"{section}.{name}": value for section, items in fields.items() for name, value in items.items()}
    return {**found, "quantization": values["quantization"]}


def versions() -> dict[str, str]:
    """Of what decides whether a run can be continued bit for bit."""
    return {"peftcli": __version__, **{name: version(name) for name in ("torch", "transformers", "accelerate")}}


@contextmanager
def _rank_log(run_folder: Path, rank: int) -> Iterator[None]:
    """On a failure write `rank-<N>.log`: the traceback, then the message on one line."""
    path = run_folder / f"rank-{rank}.log"
    path.unlink(missing_ok=True)
    try:
        yield
    except KeyboardInterrupt:
        raise
    except Interrupted as stopped:
        if machines.machines() > 1:  # the signal may have reached another machine only
            path.write_text(f"{INTERRUPTED}: {stopped.exit_code}: {stopped}\n", encoding="utf-8")
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        text = f"{traceback.format_exc()}\n{type(error).__name__}: {message}\n"
        path.write_text(printable(redact(text), 1 << 20), encoding="utf-8")
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line a launcher starts. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m peftcli.training.worker", description=__doc__)
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--resume", metavar="auto|DIR")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    options = parser.parse_args(arguments)
    try:
        run(options.run_folder, resume=options.resume)
    except PeftCliError as error:
        print(f"error: {printable(redact(str(error)), 32_000)}", file=sys.stderr)
        return error.exit_code
    except Exception:  # rank-N.log has it
        traceback.print_exc()
        return EXIT_FAILURE
    return 0


def leave(exit_code: int) -> NoReturn:
    """End a process of several at once, everything being written.

    DDP leaves a process group's threads behind, and now and then one of them aborts an interpreter that takes itself
    apart ("terminate called without an active exception"): a run that succeeded would be reported as failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    leave(main())
