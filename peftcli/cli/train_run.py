"""What `peft train` does once the recipe is checked: tokenise, plan, show, start the worker, report."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from peftcli.cli import console, run_folder, train_screens
from peftcli.data.audit import require_sound
from peftcli.errors import InputError
from peftcli.launchers import command as launcher_command
from peftcli.launchers import configs as launcher_configs
from peftcli.launchers.deepspeed import check_installed
from peftcli.launchers.machines import machine_folder, require_meeting_point
from peftcli.launchers.run import run as run_processes
from peftcli.launchers.run import worker_arguments
from peftcli.recipe.load import dump_recipe
from peftcli.recipe.task_rules import task_of
from peftcli.training.schedule import total_steps

if TYPE_CHECKING:
    from peftcli.data.prepare import Prepared, Progress
    from peftcli.recipe.schema import Recipe
    from peftcli.training.outline import Outline
    from peftcli.training.plan import MemoryPlan
    from peftcli.training.publish import RunResult


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line.

    Attributes:
        recipe: the resolved recipe.
        file: the recipe's file as typed.
        overrides: as typed.
        launcher_arguments: what stood after `--`.
        overwrite: replace an earlier run.
        audit: refuse data that the audit finds fault with.
        as_json: only JSON on stdout.
    """

    recipe: Recipe
    file: str
    overrides: Sequence[str] = ()
    launcher_arguments: Sequence[str] = ()
    overwrite: bool = False
    audit: bool = True
    as_json: bool = False


@dataclass(frozen=True)
class Setup:
    """A run of which everything is known but the result.

    Attributes:
        request: what was asked for.
        tokenizer: of the base.
        outline: of the model.
        prepared: the data.
        processes: how many there will be.
        steps: optimizer steps of the run.
        launcher: the strategy's file, completed.
        memory: what each process will need.
        command: what starts the worker; None where it runs in this process.
    """

    request: Request
    tokenizer: Any
    outline: Outline
    prepared: Prepared
    processes: int
    steps: int
    launcher: dict[str, Any]
    memory: MemoryPlan | None
    command: launcher_command.Command | None


def rehearse(request: Request) -> None:
    """Do everything up to training in a temporary folder, and show it."""
    with TemporaryDirectory(prefix="peft-") as folder:
        setup = _set_up(request, Path(folder))
        if request.as_json:
            console.say_json(
                {
                    "recipe": request.recipe.model_dump(mode="json"),
                    "model": asdict(setup.outline),
                    "data": asdict(setup.prepared.report),
                    "steps": setup.steps,
                    "memory": asdict(setup.memory) if setup.memory else None,
                    "command": asdict(setup.command) if setup.command else None,
                }
            )
            _require_sound(setup)
            return
        train_screens.show(setup)
        train_screens.show_sample(setup)
        _require_sound(setup)


def run(request: Request) -> None:
    """Train.

    Raises:
        InputError: before anything was written.
        RunError: a failure on the way; checkpoints stay.
    """
    training, launcher = request.recipe.training, request.recipe.launcher
    folder, resume = Path(training.output_dir), training.resume_from_checkpoint
    machine = launcher.machine_rank or 0
    own = machine_folder(folder, machine)
    replace_own = request.overwrite or machine > 0  # what another machine prepares there is for one start only
    run_folder.require_usable(own, overwrite=replace_own, resume=resume is not None)
    with run_folder.prepared(own) as made:
        setup = _set_up(request, made / run_folder.DATA)
        if not request.as_json:
            train_screens.show(setup)
        _require_sound(setup)
        launcher_configs.write(made / run_folder.DATA, setup.launcher)
        text = dump_recipe(_to_store(setup.request.recipe))
        with run_folder.installed(made, own, text, overwrite=resume is None or machine > 0):
            result: RunResult | None = None
            if setup.command is None:
                result = _in_this_process(request, folder, resume)
            else:
                run_processes(setup.command, own, quiet=request.as_json)
                if machine == 0:
                    result = _written(folder)
    if result is None:
        _say_done_elsewhere(machine, request.as_json)
    elif request.as_json:
        console.say_json(asdict(result))
    else:
        train_screens.show_result(request.recipe, result)


def _say_done_elsewhere(machine: int, as_json: bool) -> None:
    if as_json:
        console.say_json({"machine": machine, "ok": True})
    else:
        console.say(f"machine {machine} is done; machine 0 has written the results")


def _require_sound(setup: Setup) -> None:
    """The gate between the data and the first process; it comes behind the screen, which tells more.

    Raises:
        InputError: a fact of the audit is not as it should be.
    """
    if setup.request.audit:
        require_sound(setup.prepared.report)


def _to_store(recipe: Recipe) -> Recipe:
    """The run's recipe, which is the same however often the run is continued."""
    training = recipe.training.model_copy(update={"resume_from_checkpoint": None})
    return recipe.model_copy(update={"training": training})


def _set_up(request: Request, data_folder: Path) -> Setup:
    """Everything that can be found out before training; what can fail soonest comes first."""
    from peftcli.data.cache import prepare_cached
    from peftcli.data.cache_key import DataKey
    from peftcli.training.base_checks import whole_number
    from peftcli.training.callbacks import require_trackers
    from peftcli.training.model import load_tokenizer, open_base
    from peftcli.training.optimizers import check_optimizer
    from peftcli.training.outline import outline
    from peftcli.training.plan import plan_memory
    from peftcli.training.quantized import check_quantization

    recipe = request.recipe
    require_meeting_point(recipe.launcher)
    command = _command(request)
    processes = launcher_command.processes(recipe.launcher)
    launcher = launcher_configs.resolve(recipe, processes)
    if recipe.launcher.type == "deepspeed":
        check_installed()
    require_trackers(recipe.training.report_to)
    check_optimizer(recipe.training)
    facts = open_base(recipe.model).facts
    check_quantization(recipe.quantization, facts)
    model = outline(recipe)
    tokenizer = load_tokenizer(recipe.model)
    with _progress() as progress:
        key = DataKey(
            recipe.data,
            tokenizer,
            seed=recipe.training.seed,
            task=task_of(recipe),
            labels=recipe.model.labels,
            vocab_size=whole_number(facts, "vocab_size"),
        )
        prepared = prepare_cached(key, folder=data_folder, progress=progress)
    if prepared.report.labels != recipe.model.labels:  # the data's own
        section = recipe.model.model_copy(update={"labels": prepared.report.labels})
        recipe = recipe.model_copy(update={"model": section})
        request, model = replace(request, recipe=recipe), outline(recipe)
    memory = plan_memory(recipe, prepared.train, prepared.eval, processes=processes)
    steps = _steps(recipe, prepared, processes)
    return Setup(request, tokenizer, model, prepared, processes, steps, launcher, memory, command)


def _steps(recipe: Recipe, prepared: Prepared, processes: int) -> int:
    """Optimizer steps of the run.

    Raises:
        InputError: the method's schedule does not fit into them (AdaLoRA's).
    """
    from peftcli.training.batches import row_length, training_windows

    training, config, per_epoch = recipe.training, recipe.adapter.config, None
    if training.max_steps < 0:
        windows = training_windows(prepared.train, training, 0, world_size=processes, row_length=row_length(recipe))
        per_epoch = len(windows)
    steps = total_steps(training, per_epoch)
    if config is not None:
        try:
            copy.deepcopy(config).begin_training(steps)
        except InputError as error:
            raise error.at(field=f"adapter.{error.field}") from None
    return steps


def _in_this_process(request: Request, folder: Path, resume: str | None) -> RunResult:
    from peftcli.training import worker

    result = worker.run(folder, resume=resume, console=console.err() if request.as_json else console.out())
    assert result is not None, "the only process is the first"
    return result


def _written(folder: Path) -> RunResult:
    from peftcli.training.publish import RunResult

    return RunResult.read(folder)


def _command(request: Request) -> launcher_command.Command | None:
    """What starts the worker, or None where it runs in this process.

    Raises:
        InputError: arguments for a launcher were typed that is not used.
    """
    launcher, training = request.recipe.launcher, request.recipe.training
    if launcher_command.in_process(launcher):
        if request.launcher_arguments:
            raise InputError("no launcher is used that could take these arguments", place="after `--`")
        return None
    arguments = worker_arguments(Path(training.output_dir), training.resume_from_checkpoint)
    return launcher_command.command(launcher, arguments, request.launcher_arguments, base=os.environ)


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """Says on a terminal how many rows have been tokenised."""
    screen = console.err()
    if not screen.is_terminal:
        yield None
        return
    with screen.status("tokenising") as status:
        yield lambda path, rows: status.update(f"tokenising {Path(path).name}: {rows:,} rows")
