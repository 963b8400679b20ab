"""The finished adapter: written aside, reloaded on a fresh base and compared, and only then put in its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.data.tokens import TokenDataset
from peftcli.errors import RunError
from peftcli.files import write_atomically
from peftcli.recipe.schema import Recipe
from peftcli.training.model import load_tokenizer
from peftcli.training.quiet import quiet_transformers
from peftcli.training.strategies.plain import Strategy

RESULT_NAME = "result.json"
PROBE_TOKENS = 64
TOLERANCE = 1e-2  # of the largest logit: far above rounding, far below what a wrong tensor does

Export = Callable[[Path], None]


@dataclass(frozen=True)
class RunResult:
    """What a run came to; `result.json` in the run folder.

    Attributes:
        folder: the run folder, which holds the finished adapter.
        steps: optimizer steps done.
        step: the step that was saved.
        metrics: the evaluation of that step, or None.
        verified: how the saved files were proved to be the trained model.
        difference: largest |difference| of a logit after reloading.
        quantization: how the base was quantised, or None. A merge has to take it back first.
        stopped: why the run ended before its last step, or None.
        seconds: time in the training loop.
        tokens: tokens seen, without padding.
        memory: peak bytes of the first process.
        plot: the loss curves.
    """

    folder: str
    steps: int
    step: int
    metrics: dict[str, float] | None
    verified: str
    difference: float
    quantization: dict[str, Any] | None
    stopped: str | None
    seconds: float
    tokens: int
    memory: int
    plot: str

    def save(self, run_folder: Path) -> None:
        write_atomically(run_folder / RESULT_NAME, json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, run_folder: Path) -> RunResult:
        """What the worker of a finished run, in whatever process, left for the one that started it."""
        return cls(**json.loads((run_folder / RESULT_NAME).read_text(encoding="utf-8")))

    @classmethod
    def published_step(cls, run_folder: Path) -> int | None:
        """The step at which a run has finished, if it has and what it left can still be read."""
        try:
            return cls.read(run_folder).steps
        except (OSError, ValueError, TypeError):
            return None


def exporter(recipe: Recipe, model: Any) -> Export:
    """What writes the finished form: an adapter's files, or the whole model's with its tokenizer."""

    def export(folder: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(folder)
            if recipe.adapter.config is None:
                load_tokenizer(recipe.model).save_pretrained(folder)

    return export


def probe_of(data: TokenDataset, device: torch.device) -> dict[str, Tensor]:
    """The first tokens of the first sample, `input_ids` [1, T], its second sequence and its task where it has such."""
    border = len(data[0][0]) if data.second is None else int(data.second[0])
    first, second = (
        torch.from_numpy(ids[:PROBE_TOKENS]).long().unsqueeze(0).to(device)
        for ids in (data[0][0][:border], data[0][0][border:])
    )
    probe = {"input_ids": first}
    if data.second is not None:
        probe["decoder_input_ids"] = second
    return probe if data.tasks is None else {**probe, "task_ids": torch.from_numpy(data.tasks[:1]).to(device)}


@torch.no_grad()
def probe_logits(model: nn.Module, probe: dict[str, Tensor]) -> Tensor:
    """What the model gives for the probe's text on the CPU, without dropout; virtual tokens in front are left out.

    Logits [1, T, V], of an encoder-decoder those of the second sequence, of a classifier [1, C]; without a head, hidden
    states.
    """
    known: Any = getattr(model, "config", None)
    if not getattr(known, "is_encoder_decoder", False):
        probe = {name: tensor for name, tensor in probe.items() if name != "decoder_input_ids"}
    outputs = model.eval()(**probe)
    found = next(outputs[name] for name in ("logits", "start_logits", "last_hidden_state") if name in outputs)
    length = probe.get("decoder_input_ids", probe["input_ids"]).shape[1]
    return (found[:, -length:] if found.dim() == 3 else found).float().cpu()


def reload_difference(
    strategy: Strategy, recipe: Recipe, folder: Path, probe: dict[str, Tensor], expected: Tensor
) -> float:
    """Load the written files as a user would, and return the largest difference of a logit.

    Every process calls this where the base is sharded, the first one alone otherwise.

    Raises:
        RunError: they are not the model that was trained.
    """
    if recipe.adapter.config is None:
        section = recipe.model.model_copy(update={"name_or_path": str(folder), "revision": None})
        model: nn.Module = strategy.load_base(section, recipe.quantization)
    else:
        from peftcli import PeftModel

        base = strategy.load_base(recipe.model, recipe.quantization)
        model = PeftModel.from_pretrained(base, folder)
    with strategy.loaded(model):
        difference = float((probe_logits(model, probe) - expected).abs().max())
    if not difference <= TOLERANCE * float(expected.abs().max()):
        raise RunError(
            f"{folder}: the written files are not the model that was trained: logits differ by {difference:.3g}. "
            "The last checkpoint is unharmed"
        )
    return difference
