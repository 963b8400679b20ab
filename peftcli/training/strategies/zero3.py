"""ZeRO-3 by DeepSpeed's engine: the base sharded over the processes too, gathered where a module is about to need it.

With a base in 16 bits the module's output is rounded before an adapter adds to it, and gradients are summed in another
order, both because of DeepSpeed's hooks: losses differ from DDP's by that rounding, with one in float32 they are equal.

What an adapter owns is always whole in every process, as DeepSpeed's persistent parameters are: methods read their
tensors outside of modules' forward passes (AdaLoRA's penalty, banks that layers share). Gradients and moments are sharded.

Embeddings and head are gathered for a whole pass, without DeepSpeed's hooks: the loss calls the head once for every few
rows, as many times as a process has labels, and hooks that gather must fire in the same order in every process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters.engine import base_modules, user_model
from peftcli.errors import InputError, RunError
from peftcli.launchers.deepspeed import OTHER
from peftcli.training.shared_base import load_mapped, return_freed_blocks
from peftcli.training.strategies.deepspeed import DeepSpeed, all_on_cpu, quietly
from peftcli.training.strategies.fsdp import base_parameters
from peftcli.training.strategies.plain import MakeOptimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftcli.recipe.schema import ModelSection, QuantizationSection
    from peftcli.recipe.training_section import TrainingSection


class ZeRO3(DeepSpeed):
    """See the module."""

    shards_base = True
    _kept: list[Any]
    """What is always whole."""
    _ends: list[Any]
    """Of embeddings and head, what is whole during a pass."""

    def __init__(
        self, settings: TrainingSection, config: Mapping[str, Any] | None = None, *, project_dir: Path | None = None
    ) -> None:
        super().__init__(settings, config, project_dir=project_dir)
        self.scratch = project_dir.parent if project_dir else Path()
        return_freed_blocks()

    def load_base(self, model: ModelSection, quantization: QuantizationSection | None) -> PreTrainedModel:
        # In main memory: initialisers read weights before they are sharded, and they go to the device one by one.
        return load_mapped(model, quantization, self.scratch)

    def prepare(
        self, model: nn.Module, loss: nn.Module, make_optimizer: MakeOptimizer, *, keep_gradients: bool = False
    ) -> None:
        self.model = model
        super().prepare(model, loss, make_optimizer, keep_gradients=keep_gradients)
        self._take_over(loss)

    def _take_over(self, root: nn.Module) -> None:
        """Keep what adapters own, and embeddings and head while `root` (the model, or what wraps it) runs."""
        offload = getattr(self.engine.optimizer, "parameter_offload", self.engine.optimizer)
        self._kept = offload.persistent_parameters
        sharded = base_parameters(self.model)
        others: Iterator[Any] = (p for p in root.parameters() if p not in sharded)
        self._kept.extend(p for p in others if not p.ds_persist)
        for parameter in self._kept:
            parameter.ds_persist = parameter.is_external_param = True  # no module lets it go
        self._gather(self._kept)

        base = user_model(self.model)
        found = [getattr(base, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
        modules = {inner for module in found if isinstance(module, nn.Module) for inner in module.modules()}
        # An adapter's own modules may be called by one process alone: its prompts, when they are saved.
        bases = {module for _, module in base_modules(base)}
        added = (m for m in root.modules() if m is not root and m not in bases)
        unhooked = modules | {m for m in added if sharded.isdisjoint(m.parameters(recurse=False))}
        tables = {id(table) for m in unhooked for table in (m._forward_pre_hooks, m._forward_hooks)}
        for handle in (*offload.forward_hooks, *offload.backward_hooks):
            if id(handle.hooks_dict_ref()) in tables:
                handle.remove()
        own: Iterator[Any] = (p for m in modules for p in m.parameters(recurse=False))
        self._ends = sorted({p for p in own if not p.ds_persist}, key=lambda p: p.ds_id)
        for parameter in self._ends:
            parameter.is_external_param = True
        root.register_forward_pre_hook(lambda *_: self._gather(self._ends))
        root.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else self._release_ends())

    @staticmethod
    def _gather(parameters: list[Any]) -> None:
        if parameters:
            parameters[0].all_gather(parameters)

    def _release_ends(self) -> None:
        if self._ends:
            self._ends[0].partition(self._ends)

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        self._release_ends()

    def _initialize(self, module: nn.Module, **arguments: Any) -> Any:
        import deepspeed

        with quietly():
            deepspeed.zero.Init(module=_OneByOne(module), config_dict_or_path=dict(self.config), dtype=torch.float32)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(self.accelerator.device)
        return super()._initialize(module, **arguments)

    def describe(self) -> str:
        self._check_stage()
        count, whole, own = self.accelerator.num_processes, 0, 0
        managed = base_parameters(self.model)
        for name, parameter in self.model.named_parameters():
            zero: Any = parameter  # what DeepSpeed adds to it
            if parameter not in managed or zero.ds_persist:
                continue
            whole, own = whole + zero.ds_numel, own + zero.ds_tensor.numel()
            if parameter.numel() or zero.ds_tensor.numel() != -(-zero.ds_numel // count):
                raise RunError(f"{name} is not sharded over {count} processes, as ZeRO-3 asks for")
        shared = f"{count} processes share the base (DeepSpeed ZeRO-3): {own:,} of its {whole:,} values are here"
        return shared + self._main_memory()

    def _offloaded(self) -> set[str]:
        zero = self.engine.optimizer
        shards = (p.ds_tensor for p in self.model.parameters())  # type: ignore[attr-defined]  # DeepSpeed's
        found = {
            "offload_optimizer": zero.offload_optimizer and all_on_cpu(self._flat()),
            "offload_param": zero.offload_param and all_on_cpu(shards),
        }
        return {name for name, there in found.items() if there}

    def _flat(self) -> list[nn.Parameter]:
        return self.engine.optimizer.fp32_partitioned_groups_flat

    def gradient_norm(self) -> Tensor:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return self._norm(combine_grad_norm_groups(self.engine.optimizer._get_norm_groups()))

    @contextmanager
    def whole(self, *, gradients: bool = False, write: bool = False) -> Iterator[None]:
        from deepspeed.runtime.zero import GatheredParameters

        trained = self._trained()
        frozen_ends = [p for p in self._ends if not p.requires_grad]  # adapters of embeddings are saved with their base
        with GatheredParameters(trained, modifier_rank=0 if write else None), GatheredParameters(frozen_ends):
            for parameter, gradient in self._gradients.items() if gradients else ():
                parameter.grad = gradient.to(parameter.dtype)
            yield
            for parameter in self._gradients if gradients else ():
                parameter.grad = None
        for parameter in trained if write else ():  # the optimizer's copies follow
            shard = parameter.ds_tensor.data.to(torch.float32)  # type: ignore[attr-defined]
            self.engine.optimizer.set_local_hp_param(shard, parameter)
        self._gather(self._kept)

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        self.engine.optimizer.parameter_offload.get_param_coordinator().reset_step()
        self._gather(self._ends)
        yield
        self._release_ends()

    @contextmanager
    def loaded(self, model: nn.Module) -> Iterator[None]:
        self.model, self.engine = model, self._initialize(model)
        self._take_over(model)
        yield
        self._destroy()

    def _set(self, parameter: nn.Parameter, value: Tensor, field: str | None = None) -> None:
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        count, rank = self.accelerator.num_processes, self.accelerator.process_index
        flat = value.flatten().to(torch.float32)
        padded = nn.functional.pad(flat, (0, size * count - flat.numel()))
        self.engine.optimizer.set_local_hp_param(padded.narrow(0, rank * size, size), parameter, field)

    def _partitions(self) -> Iterator[tuple[nn.Parameter, dict[str, nn.Parameter]]]:
        zero = self.engine.optimizer
        names = {id(p): name for p, name in zip((p for g in self._groups for p in g), self.names, strict=True)}
        for flat, parameters in zip(self._flat(), zero.fp16_groups, strict=True):
            yield flat, {names[id(parameter)]: parameter for parameter in parameters}

    def _link_state(self) -> None:
        """ZeRO-3 looks its state up where the optimizer keeps it."""

    def finish(self) -> None:
        del self._kept, self._ends
        super().finish()

    def _destroy(self) -> None:
        from deepspeed.runtime.zero import parameter_offload

        super()._destroy()
        parameter_offload.FWD_MODULE_STACK.clear()  # else it would keep the model


class _OneByOne(nn.Module):
    """Gives a module's parameters each in memory of its own, when its turn has come.

    DeepSpeed overwrites each by the first process's, then cuts it up: that would copy every page of a mapped file,
    and no page can go before the whole file can.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for parameter in super().parameters(recurse):
            parameter.data = parameter.data.clone()
            yield parameter


def require_fused_experts(model: nn.Module) -> None:
    """Refuse bases whose experts are modules of their own: a token decides which run, and so which a process gathers.

    Raises:
        InputError: naming the list of them.
    """
    for path, module in base_modules(model):
        if isinstance(module, nn.ModuleList) and "expert" in path.rpartition(".")[2]:
            raise InputError(
                f"{path}: are modules of their own, of which each process would run, and gather, other ones",
                field="launcher.config",
                fix=OTHER,
            )
