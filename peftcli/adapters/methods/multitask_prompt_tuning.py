"""Multitask prompt tuning: one prompt for all tasks, times a rank-r matrix for each (Wang et al. 2023, arXiv 2303.02861).

P_task = P * (cols_task rows_task), elementwise. First P and all tasks are trained together; then one task of a new model
starts at P and the mean, or one, of the tasks learnt before.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from peftcli.adapters.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from peftcli.adapters.prompt_base import Size
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

SPREAD = 0.02  # standard deviation of fresh tasks


class MultitaskPromptTuningInit(str, Enum):
    """Where prompt and tasks start."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


MultitaskInit = (
    Literal["TEXT", "RANDOM", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"]
    | MultitaskPromptTuningInit
)

FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning's fields, as in PEFT.

    Attributes:
        prompt_tuning_init: see `MultitaskPromptTuningInit`.
        prompt_tuning_init_state_dict_path: the adapter trained on the source tasks: its folder or its file.
        prompt_tuning_init_task: which of its tasks EXACT_SOURCE_TASK starts at.
        num_ranks: rank of a task's matrix.
        num_tasks: how many tasks; `task_ids` of a batch tell the task of each row.
    """

    peft_type = "MULTITASK_PROMPT_TUNING"
    inits: ClassVar[type[Enum]] = MultitaskPromptTuningInit

    prompt_tuning_init: MultitaskInit = MultitaskPromptTuningInit.RANDOM  # type: ignore[assignment]  # others than its parent's
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: Annotated[int, Ge(0)] | None = 0
    num_ranks: Size = 1
    num_tasks: Size = 1

    def validate(self) -> None:
        super().validate()
        if self.inference_mode or self.prompt_tuning_init not in FROM_SOURCE:
            return
        if self.prompt_tuning_init_state_dict_path is None:
            raise InputError(
                f"prompt_tuning_init_state_dict_path needs to be specified with {self.prompt_tuning_init} init method",
                field="prompt_tuning_init_state_dict_path",
            )
        if self.prompt_tuning_init != "ONLY_SOURCE_SHARED" and self.num_tasks != 1:
            raise InputError(
                "one task starts at what the source tasks learnt, not several", field="num_tasks", allowed="1"
            )


class MultitaskPromptTuning(PromptTuning):
    """A shared prompt, turned into each task's own."""

    in_decoder = True

    def parts(self) -> dict[str, nn.Module | nn.Parameter | Tensor]:
        shapes = self.stored_shapes()
        tasks = {name: shapes[name] for name in ("prefix_task_cols", "prefix_task_rows")}
        return super().parts() | {
            name: torch.nn.Parameter(torch.randn(shape) * SPREAD) for name, shape in tasks.items()
        }

    def initialize(self, p: Any, words: nn.Embedding) -> None:
        super().initialize(p, words)
        init = self.config.prompt_tuning_init
        if init not in FROM_SOURCE:
            return
        source = self._source()
        wanted = {"prompt_embeddings": source["prompt_embeddings"]}
        for name in ("prefix_task_cols", "prefix_task_rows"):
            if init == "AVERAGE_SOURCE_TASKS":
                wanted[name] = source[name].mean(0, keepdim=True)
            elif init == "EXACT_SOURCE_TASK":
                wanted[name] = source[name][self._source_task(len(source[name]))].unsqueeze(0)
        for name, tensor in wanted.items():
            target = self.live(p)[name]
            if tensor.shape != target.shape:
                raise InputError(
                    f"has the shape {list(tensor.shape)}, but {list(target.shape)} is needed",
                    place=self.config.prompt_tuning_init_state_dict_path,
                    field=name,
                )
            target.copy_(tensor)

    def _source(self) -> dict[str, Tensor]:
        from peftcli.adapters.checkpoint import read_tensor_file, read_tensors

        place = Path(self.config.prompt_tuning_init_state_dict_path)
        read = read_tensors if place.is_dir() else read_tensor_file
        tensors = read(
            place, allow_pickle=True
        )  # named by the user, and proved to hold plain tensors before it is opened
        for name in self.stored_shapes():
            if name not in tensors:
                raise InputError("is missing from the file", place=place, field=name)
        return tensors

    def _source_task(self, tasks: int) -> int:
        task = self.config.prompt_tuning_init_task or 0
        if task >= tasks:
            raise InputError(
                f"is {task}, but the source has {tasks} tasks",
                field="prompt_tuning_init_task",
                allowed=f"0 to {tasks - 1}",
            )
        return task

    def prompt(self, p: Any, task_ids: Tensor | None = None) -> Tensor:
        if task_ids is None:
            if self.config.num_tasks > 1:
                raise InputError(
                    "task_ids cannot be None", field="task_ids", fix="give the task of each row of the batch"
                )
            task_ids = torch.zeros(1, dtype=torch.long)
        task_ids = task_ids.to(p.embedding.weight.device)
        if not torch.compiler.is_compiling():  # a compiled graph can't look at values
            self._require_known(task_ids)
        return p.embedding.weight * (p.prefix_task_cols[task_ids] @ p.prefix_task_rows[task_ids])

    def _require_known(self, task_ids: Tensor) -> None:
        last = self.config.num_tasks - 1
        if not 0 <= int(task_ids.min()) <= int(task_ids.max()) <= last:
            raise InputError("names a task that is not there", field="task_ids", allowed=f"0 to {last}")

    def live(self, p: Any) -> dict[str, Tensor]:
        return super().live(p) | {"prefix_task_cols": p.prefix_task_cols, "prefix_task_rows": p.prefix_task_rows}

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        tasks, ranks = self.config.num_tasks, self.config.num_ranks
        return super().stored_shapes() | {
            "prefix_task_cols": (tasks, self.tokens, ranks),
            "prefix_task_rows": (tasks, ranks, self.width),
        }
