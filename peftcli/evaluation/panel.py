"""The adapters, and models trained in full, that are compared in one run: they share a base, and the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from peftcli.errors import InputError
from peftcli.evaluation.subject import Subject, find_subject

if TYPE_CHECKING:
    from peftcli.data.tokens import TokenDataset
    from peftcli.evaluation.bench import Bench
    from peftcli.evaluation.judge import Judge

ONLY = "tuned"
"""The column of an adapter that is compared with nothing but its base."""


@dataclass(frozen=True)
class Panel:
    """Adapters of one base, by column. The first decides how data is read."""

    subjects: dict[str, Subject]

    @property
    def first(self) -> Subject:
        return next(iter(self.subjects.values()))

    @property
    def base(self) -> str:
        return self.first.model.name_or_path

    @property
    def bf16(self) -> bool:
        """Whether to compute in bfloat16: if every adapter was trained so."""
        return all(subject.bf16 for subject in self.subjects.values())

    @property
    def task(self) -> str:
        """What all of them were trained to do."""
        return self.first.task

    def bench(self) -> Bench:
        """The base, loaded once, and its adapters. A head that the base does not bring is the same in every run."""
        import torch

        from peftcli.evaluation.bench import Bench
        from peftcli.training.model import load_base

        torch.manual_seed(0)
        base = load_base(self.first.model, self.first.quantization)
        whole = {
            column: partial(load_base, subject.whole_model)
            for column, subject in self.subjects.items()
            if subject.is_whole
        }
        return Bench(base, {column: subject.adapter for column, subject in self.subjects.items()}, whole)

    def judge(self, data: TokenDataset, tokenizer: Any, batch_size: int) -> Judge | None:
        """What measures tasks other than a language model's; pairs are told apart in batches as in training."""
        from peftcli.evaluation.judge import Setting
        from peftcli.evaluation.judges import JUDGES

        recipe = self.first.recipe
        if self.task not in JUDGES or recipe is None:
            return None
        if self.task == "FEATURE_EXTRACTION":
            batch_size = recipe.training.per_device_eval_batch_size
        setting = Setting(tokenizer, recipe.model.labels or (), batch_size, recipe.training.temperature, self.bf16)
        return JUDGES[self.task](data, setting)

    def data(
        self, tokenizer: Any, path: str | None, *, format: str | None = None, max_samples: int | None = None
    ) -> tuple[TokenDataset, list[str]]:
        """The samples to evaluate on, and what should be known about them. As `Subject.data`.

        Raises:
            InputError: also if no file is named and the adapters' runs held out different data.
        """
        data, warnings = self.first.data(tokenizer, path, format=format, max_samples=max_samples)
        for column, subject in list(self.subjects.items())[1:]:
            if path is None and not subject.has_held_out(data):
                raise InputError(
                    f"was evaluated on other data than {self.first.adapter}",
                    place=subject.adapter,
                    fix="name a file that none was trained on: --data FILE",
                )
            if path is not None:  # a run's own held-out data were looked at when it was trained
                warnings += [f"{column}: {warning}" for warning in subject.overlap(data)]
        return data, warnings


def gather(paths: Sequence[str], base: str | None = None) -> Panel:
    """What `peft eval PATH...` is about.

    Args:
        paths: adapter or run folders, recipes that were trained, or adapters' ids on the hub.
        base: the base to use instead of the one they name.

    Raises:
        InputError: no adapter at one of them, or adapters of different bases.
    """
    subjects = [find_subject(path, base) for path in paths]
    for subject in subjects[1:]:
        for what, theirs, ours in _conditions(subject, subjects[0]):
            if _resolved(ours) != _resolved(theirs):
                raise InputError(
                    f"has another {what} than {subjects[0].adapter}: {theirs}, not {ours}",
                    place=subject.adapter,
                    fix="name the base both belong to: --base BASE" if what == "base" else "evaluate them one by one",
                )
    return Panel(dict(zip(_columns([str(subject.adapter) for subject in subjects]), subjects, strict=True)))


def _columns(paths: Sequence[str]) -> list[str]:
    """A short name for each adapter: as many of its path's last parts as tell it from the others."""
    if len(paths) == 1:
        return [ONLY]
    parts = [PurePath(path).parts for path in paths]
    for index, one in enumerate(parts):
        if one in parts[:index]:
            raise InputError("is named twice", place=paths[index])
    return [next(_unique(one, [other for other in parts if other is not one])) for one in parts]


def _unique(one: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> Iterator[str]:
    for count in range(1, len(one) + 1):
        name = "/".join(one[-count:])
        if name != "base" and all(other[-count:] != one[-count:] for other in others):
            yield name
    yield "/".join(one) + "/"


def _conditions(one: Subject, other: Subject) -> Iterator[tuple[str, str, str]]:
    """What has to be the same for two adapters to be compared: its name, and both values."""
    yield "base", one.model.name_or_path, other.model.name_or_path
    yield "revision of the base", str(one.model.revision), str(other.model.revision)
    yield "type of the base's weights", one.model.dtype, other.model.dtype
    yield "quantization of the base", str(one.quantization), str(other.quantization)
    yield "task", one.task, other.task
    yield "set of classes", str(one.model.labels), str(other.model.labels)


def _resolved(name: str) -> str:
    """A folder's real path, so that one base is one however it is written; any other name as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name
