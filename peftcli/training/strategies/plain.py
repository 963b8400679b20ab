"""One process, or several that each hold the whole model and average their gradients (DDP)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch  # noqa: TID253
from accelerate import Accelerator, DistributedDataParallelKwargs  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253
from torch.nn.utils import clip_grads_with_norm_, get_total_norm  # noqa: TID253
from torch.optim import Optimizer  # noqa: TID253

from peftcli.errors import RunError
from peftcli.training import state
from peftcli.training.machines import machines
from peftcli.training.model import load_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftcli.recipe.schema import LauncherSection, ModelSection, QuantizationSection
    from peftcli.recipe.training_section import TrainingSection

DDP_OPTIONS = DistributedDataParallelKwargs(find_unused_parameters=True)
"""A trained parameter that a batch leaves out (the pooler in front of no head, an expert nobody is sent to) must not keep DDP
waiting for its gradient: it would leave others of the step unaveraged, and say so at the next step only, if there is one."""

MakeOptimizer = Callable[[], Optimizer]
"""Builds the optimizer over the model's trainable parameters, as they are by then."""


class Strategy:
    """Also the interface of all strategies. Every process calls every method, in the same order.

    Args:
        settings: the recipe's `training` section.
        config: the launcher file, resolved; empty where the strategy has none.
        project_dir: where trackers write.

    Attributes:
        name: what checkpoints say they were written under.
        accelerator: knows the processes and this one's device; sharding is not its business.
        loss: after `prepare`, the module to call for a training loss.
        scoring: after `prepare`, the module to call for an evaluation.
        optimizer: after `prepare`, torch's own; schedules set the rates of its groups.
        names: after `prepare`, of the optimizer's parameters, in its order.
    """

    shards_base = False
    """Whether no process holds the whole base."""

    model: nn.Module
    loss: nn.Module
    scoring: nn.Module
    optimizer: Optimizer
    names: list[str]

    def __init__(
        self, settings: TrainingSection, config: Mapping[str, Any] | None = None, *, project_dir: Path | None = None
    ) -> None:
        self.settings, self.config = settings, config or {}
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            log_with=list(settings.report_to) or None,
            project_dir=project_dir,
            kwargs_handlers=[DDP_OPTIONS],
        )
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        self.name = "one process" if self.accelerator.num_processes == 1 else "DDP"

    # -- what it is ---------------------------------------------------------------------------------------------------

    def check_processes(self, launcher: LauncherSection) -> None:
        """Die at once where a launcher silently started other processes than it was asked for.

        Raises:
            RunError: naming both numbers.
        """
        wanted = 1 if launcher.type == "none" else launcher.num_processes
        if wanted not in ("auto", self.accelerator.num_processes):
            raise RunError(
                f"the recipe asks for {wanted} processes, but {self.accelerator.num_processes} came up "
                f"({self.accelerator.distributed_type.value})"
            )
        if machines() != launcher.num_machines:
            raise RunError(f"the recipe asks for {launcher.num_machines} machines, but {machines()} came up")

    def describe(self) -> str:
        """What really runs, read back from the live model after `prepare`, in a line for the screen.

        Raises:
            RunError: it is not what the recipe asked for.
        """
        count = self.accelerator.num_processes
        if count == 1:
            return "one process"
        if not isinstance(self.loss, nn.parallel.DistributedDataParallel):
            raise RunError(f"{count} processes came up, but they would not average their gradients")
        return f"{count} processes, each with the whole model (DDP)"

    # -- the model ----------------------------------------------------------------------------------------------------

    def load_base(self, model: ModelSection, quantization: QuantizationSection | None) -> PreTrainedModel:
        """The base with its weights, as this strategy keeps them before training."""
        return load_base(model, quantization, device=self.accelerator.device)

    def prepare(
        self, model: nn.Module, loss: nn.Module, make_optimizer: MakeOptimizer, *, keep_gradients: bool = False
    ) -> None:
        """Make ready to train; sets `model`, `loss`, `scoring`, `optimizer` and `names`.

        Args:
            model: with its adapters; parameters that require gradients are trained.
            loss: `CausalLMLoss` around it.
            make_optimizer: called once the parameters are what they will be in training.
            keep_gradients: `whole(gradients=True)` will be asked for after steps.
        """
        self.model, self.scoring = model, loss
        self.optimizer = make_optimizer()
        self.names = state.parameter_names(model, self.optimizer)
        self.loss, self._accelerated = self.accelerator.prepare(loss, self.optimizer)

    # -- a step -------------------------------------------------------------------------------------------------------

    def batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one batch; gradients need only be whole after the last of a window."""
        self.accelerator.sync_gradients = last
        return nullcontext() if last else self.accelerator.no_sync(self.loss)

    def backward(self, loss: Tensor) -> None:
        """Gradients of this process's loss (); they are averaged over the processes."""
        self.accelerator.backward(loss)

    def gradient_norm(self) -> Tensor:
        """() of all trained parameters together, after a window's last `backward`. Not finite if any gradient isn't."""
        return get_total_norm([p.grad for p in self._trained() if p.grad is not None])

    def step(self, norm: Tensor, max_norm: float) -> None:
        """One optimizer step with gradients clipped to `max_norm` (0: not at all); `norm` is `gradient_norm()`."""
        if max_norm:
            clip_grads_with_norm_(self._trained(), max_norm, norm)
        self._accelerated.step()

    def zero_grad(self) -> None:
        self._accelerated.zero_grad()

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    # -- reading and writing what is trained --------------------------------------------------------------------------

    @contextmanager
    def whole(self, *, gradients: bool = False, write: bool = False) -> Iterator[None]:
        """While open, every trained parameter of the model is a whole plain tensor, in every process.

        Args:
            gradients: `.grad` too: as the last step used them, clipped. Before `zero_grad`, and only if `prepare` was told.
            write: values changed inside, in every process alike, are kept at the end; where the base is sharded, those of
                the first process, which may be the only one to change any.
        """
        yield

    def forwarding(self) -> AbstractContextManager[None]:
        """Around calls of the trained model itself, in evaluation mode, instead of `scoring`. All processes call alike."""
        return nullcontext()

    def loaded(self, model: nn.Module) -> AbstractContextManager[None]:
        """Around calls of a model that `load_base` has loaded and nobody will train, once `finish` was called."""
        return nullcontext()

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The optimizer's state in one form for every strategy, so that a checkpoint continues under any of them.

        Returns:
            Whole tensors `<parameter>/<field>` (the first process needs them), and plain values: see `split_optimizer`.
        """
        return state.split_optimizer(self.optimizer, self.names)

    def load_optimizer_state(self, folder: Path, plain: dict[str, Any]) -> None:
        """Undo `optimizer_state`, from a checkpoint's folder."""
        state.join_optimizer(self.optimizer, self.names, folder, plain)

    def finish(self) -> None:
        """Let go of the model, and free what training held: gradients, moments."""
        for name in ("model", "loss", "scoring", "optimizer", "_accelerated"):
            self.__dict__.pop(name, None)
        self.accelerator.free_memory()
