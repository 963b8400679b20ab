"""No field of a recipe is taken and then forgotten: whole runs, in which every reading of a field is noted."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tasks import make_run

import peftcli
from peftcli.adapters.config import PeftConfig
from peftcli.adapters.methods.lora import LoraConfig
from peftcli.adapters.registry import config_class
from peftcli.cli import main
from peftcli.data.sources import read_source
from peftcli.errors import InputError
from peftcli.launchers.command import command
from peftcli.recipe.adapter_section import settable
from peftcli.recipe.schema import (
    DataSection,
    DataSource,
    EvalSplit,
    LauncherSection,
    ModelSection,
    PreferenceSection,
    Recipe,
)
from peftcli.recipe.section import Section
from peftcli.recipe.training_section import TrainingSection

PACKAGE = Path(peftcli.__file__).parent
NO_USE = ("recipe", "inspection", "cli/train_screens.py", "cli/console.py", "adapters/config.py", "training/card.py")
"""Where reading a field only checks or shows it."""

NOTHING_TO_CHOOSE = {"megatron_config", "megatron_core"}
"""Fields of PEFT's configs that can hold one value only, or belong to one that can."""

FIRST = """
model: {name_or_path: base, task_type: CAUSAL_LM}
adapter:
  {method: lora, r: 4, target_modules: [q_proj, v_proj], lora_dropout: 0.1, rank_pattern: {v_proj: 2},
   layers_to_transform: [1], layers_pattern: layers}
data:
  train: [{path: train.jsonl, weight: 2.0, max_samples: 12, columns: {prompt: question}}]
  eval: {split: 0.25}
training:
  output_dir: first
  max_steps: 4
  per_device_train_batch_size: 2
  eval_steps: 2
  save_steps: 2
  logging_steps: 1
  report_to: tensorboard
  loraplus_lr_ratio: 4
  early_stopping_patience: 9
"""
SECOND = """
extends: first.yaml
data: {train: {path: folder, split: train}}
adapter: {target_modules: all-linear, rank_pattern: {}, layers_to_transform: null, layers_pattern: null}
training: {output_dir: second, max_steps: -1, num_train_epochs: 0.5, optim: sgd, report_to: none, warmup_steps: 1,
  loraplus_lr_ratio: null, eval_strategy: epoch, save_strategy: epoch}
launcher: {type: none}
"""


@pytest.fixture
def recipes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "first.yaml").write_text(FIRST)
    (place / "second.yaml").write_text(SECOND)
    text = (place / "train.jsonl").read_text()
    (place / "train.jsonl").write_text(text.replace("prompt", "question"))
    (place / "folder").mkdir()
    (place / "folder/train-0.jsonl").write_text(text)
    monkeypatch.chdir(place)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[type, str]]]:
    """(class, field) of every section's and config's field that was read where it has an effect."""
    found: set[tuple[type, str]] = set()
    for cls in (Section, PeftConfig):
        monkeypatch.setattr(cls, "__getattribute__", noting(found), raising=False)
    yield found


def noting(found: set[tuple[type, str]]) -> Any:
    def __getattribute__(self: Any, name: str) -> Any:
        if not name.startswith("_"):
            file = Path(sys._getframe(1).f_code.co_filename)
            if file.is_relative_to(PACKAGE) and not str(file.relative_to(PACKAGE)).startswith(NO_USE):
                found.add((type(self), name))
        return object.__getattribute__(self, name)

    return __getattribute__


def test_every_field_is_read(place: Path, recipes: None, read: set[tuple[type, str]]) -> None:
    assert main(["train", "first.yaml"]) == 0
    assert main(["train", "second.yaml"]) == 0
    stream = ["data.streaming=true", "training.max_steps=1", "training.eval_strategy=no", "training.save_strategy=no"]
    assert (
        main(
            [
                "train",
                "second.yaml",
                *stream,
                "data.eval=folder/train-0.jsonl",
                "training.output_dir=third",
                "--no-audit",
            ]
        )
        == 0
    )
    for task in ("dpo", "FEATURE_EXTRACTION"):
        (folder := place / task).mkdir()
        assert main(["train", str(make_run(task, folder, max_steps=1)), "--no-audit"]) == 0
    with pytest.raises(InputError):  # tests have no network
        list(read_source(DataSource(path="some/hub-name", name="x"), ("train",)))
    machines = LauncherSection(num_processes=2, num_machines=2, machine_rank=0, main_process_ip="node-0")
    command(machines, [], base={})
    sections = (Recipe, ModelSection, DataSection, DataSource, EvalSplit, TrainingSection, LauncherSection)
    sections += (PreferenceSection,)
    leaves = {(cls, name) for cls in sections for name in cls.model_fields}
    assert not {f"{cls.__name__}.{name}" for cls, name in leaves - read}


def test_every_field_of_lora_is_read(recipes: None, read: set[tuple[type, str]]) -> None:
    assert main(["train", "first.yaml"]) == 0
    unread = set(settable(LoraConfig)) - {name for cls, name in read if cls is LoraConfig} - NOTHING_TO_CHOOSE
    assert not unread
    assert {item.name for item in dataclasses.fields(config_class("LORA"))} >= NOTHING_TO_CHOOSE
