"""What is to be evaluated: an adapter or a tuned model, the base it belongs to, and data in the form it was trained on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.adapters.config import CONFIG_NAME, TaskType, read_config
from peftcli.data.formats import TASK_FORMATS
from peftcli.errors import InputError, nearest, printable
from peftcli.names import MODEL_CONFIG, RECIPE
from peftcli.recipe.adapter_section import FULL
from peftcli.recipe.load import load_recipe
from peftcli.recipe.schema import DataSection, DataSource, ModelSection, QuantizationSection, Recipe
from peftcli.recipe.task_rules import task_of

if TYPE_CHECKING:
    from peftcli.data.tokens import TokenDataset

TRAIN_DATA, EVAL_DATA = Path("data") / "train.safetensors", Path("data") / "eval.safetensors"


@dataclass(frozen=True)
class Subject:
    """An adapter, or a model that was trained in full, and how to run it.

    Args:
        adapter: its folder, or an adapter's id on the hub.
        model: the base.
        quantization: of the base.
        run: the run folder it was trained in, if it is known.
        recipe: how it was trained, if that is known.
    """

    adapter: Path | str
    model: ModelSection
    quantization: QuantizationSection | None
    run: Path | None
    recipe: Recipe | None

    @property
    def task(self) -> str:
        """What it was trained to do: a key of `TASK_FORMATS`."""
        return "CAUSAL_LM" if self.recipe is None else task_of(self.recipe)

    @property
    def is_whole(self) -> bool:
        """Whether it is a model of its own, trained in full, rather than an adapter."""
        return self.recipe is not None and self.recipe.adapter.method == FULL

    @property
    def whole_model(self) -> ModelSection:
        """That model, to be loaded as the base is."""
        return self.model.model_copy(update={"name_or_path": str(self.adapter), "revision": None})

    @property
    def bf16(self) -> bool:
        """Whether it was trained under bfloat16 autocast."""
        return self.recipe is not None and self.recipe.training.bf16

    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        from peftcli.training.model import load_tokenizer

        return load_tokenizer(self.model)

    def data(
        self, tokenizer: Any, path: str | None, *, format: str | None = None, max_samples: int | None = None
    ) -> tuple[TokenDataset, list[str]]:
        """The samples to evaluate on, tokenised as in training, and what should be known about them.

        Args:
            tokenizer: the base's.
            path: a data file or folder; by default the evaluation data of the training run.
            format: of that file, where it differs from the training data's.
            max_samples: at most this many.

        Raises:
            InputError: no data, or data that can't be used.
        """
        from peftcli.data.prepare import prepare
        from peftcli.data.tokens import TokenDataset

        if path is None:
            prepared = self.run / EVAL_DATA if self.run else None
            if prepared is None or not prepared.is_file():
                raise InputError(
                    "the adapter brings no evaluation data", place=self.adapter, fix="name a file: --data FILE"
                )
            dataset = TokenDataset.load(prepared)
            chosen = dataset.questions[:max_samples]
            return dataset.select([index for question in chosen for index in question]), []
        section = self._section(path, format, max_samples)
        with tempfile.TemporaryDirectory(prefix="peft-eval-") as folder:
            found = prepare(section, tokenizer, folder=Path(folder), seed=0, task=self.task, labels=self.model.labels)
        return found.train, [*found.report.warnings, *self.overlap(found.train)]

    def has_held_out(self, data: TokenDataset) -> bool:
        """Whether every sample of `data` was held out by the run that trained the adapter."""
        return self.run is not None and all(_known_to(data, self.run / EVAL_DATA))

    def overlap(self, data: TokenDataset) -> Iterator[str]:
        """A warning if the adapter was trained on some of `data`."""
        if self.run is None:
            return
        if count := sum(_known_to(data, self.run / TRAIN_DATA)):
            yield f"{count} of {len(data)} samples were trained on: the adapter will look better than it is"

    def _section(self, path: str, format: str | None, max_samples: int | None) -> DataSection:
        """The recipe's data section with `path` in place of its sources; columns and format are theirs."""
        formats = ("auto", *TASK_FORMATS[self.task])
        if format is not None and format not in formats:
            problem, close = f"{printable(repr(format))} is not a format", str(nearest(format, formats))
            raise InputError(problem, field="--format", allowed=", ".join(formats), fix=close or None)
        trained = self.recipe.data if self.recipe else None
        first = trained.train[0] if trained else None
        source = DataSource(
            path=str(Path(path).resolve()) if Path(path).exists() else path,
            format=format or (first.format if first else None),  # type: ignore[arg-type]
            columns=first.columns if first and format is None else None,
            max_samples=max_samples,
        )
        if trained is None:
            return DataSection(train=(source,))
        return trained.model_copy(update={"train": (source,), "eval": None, "packing": "none"})


def _known_to(data: TokenDataset, file: Path) -> list[bool]:
    """For each sample, whether a run's prepared data holds it, token by token."""
    from peftcli.data.tokens import TokenDataset

    if not file.is_file():
        return [False] * len(data)
    stored = TokenDataset.load(file)
    known = {stored[index][0].tobytes() for index in range(len(stored))}
    return [data[index][0].tobytes() in known for index in range(len(data))]


def find_subject(path: str, base: str | None = None) -> Subject:
    """What `peft eval PATH` is about.

    Args:
        path: an adapter or run folder, a recipe that was trained, or an adapter's id on the hub.
        base: the base to use instead of the one the recipe or the adapter names.

    Raises:
        InputError: nothing trained there, or no base named.
    """
    given = Path(path)
    recipe: Recipe | None = None
    run: Path | None
    if given.suffix in (".yaml", ".yml"):
        recipe = load_recipe(given, check_paths=False)
        run = Path(recipe.training.output_dir)
        adapter: Path | str = run
    else:
        run = next((folder for folder in (given, given.parent) if (folder / RECIPE).is_file()), None)
        adapter = given if given.exists() else path
    if run is not None and (run / RECIPE).is_file():  # what was trained, whatever became of the recipe since
        recipe = load_recipe(run / RECIPE, check_paths=False)
    if isinstance(adapter, Path):
        _require_trained(adapter, recipe, f"train it first: peft train {path}" if adapter != given else None)
    return Subject(adapter, _model(adapter, recipe, base), recipe.quantization if recipe else None, run, recipe)


def _require_trained(folder: Path, recipe: Recipe | None, fix: str | None) -> None:
    """Raises:
    InputError: the folder holds no adapter; of a full fine-tuning, no model.
    """
    if recipe is not None and recipe.adapter.method == FULL:
        what, mark = "model", MODEL_CONFIG
        fix = fix or "name the run folder of a full fine-tuning that has finished: its checkpoints are for resuming"
    else:
        what, mark = "adapter", CONFIG_NAME
        fix = fix or "name an adapter or run folder"
    if not (folder / mark).is_file():
        raise InputError(f"there is no {what} here: no {mark}", place=folder, fix=fix)


def _model(adapter: Path | str, recipe: Recipe | None, base: str | None) -> ModelSection:
    """The base as the recipe or, without one, the adapter's config names it; `base` goes before both."""
    if recipe is not None:
        return recipe.model.model_copy(update={"name_or_path": base, "revision": None}) if base else recipe.model
    from peftcli.adapters.checkpoint import resolve_adapter_folder

    config = read_config(resolve_adapter_folder(adapter) / CONFIG_NAME)
    if config.task_type not in (None, TaskType.CAUSAL_LM):
        raise InputError(
            f"was trained for {printable(config.task_type)}, and without its run's recipe nothing tells classes and data",
            place=adapter,
            field="task_type",
            fix="name the run folder it was trained in",
        )
    if base is not None:
        return ModelSection(name_or_path=base)
    if not config.base_model_name_or_path:
        raise InputError("the adapter does not say which base it belongs to", place=adapter, fix="name it: --base BASE")
    return ModelSection(name_or_path=config.base_model_name_or_path, revision=config.revision)
