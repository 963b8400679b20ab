"""ZeRO by DeepSpeed's own engine: optimizer state (1) and gradients (2) spread over the processes.

The optimizer is torch's, over DeepSpeed's flat float32 partitions; base and adapter keep the types they have elsewhere.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch  # noqa: TID253
from safetensors.torch import load_file
from torch import Tensor, nn  # noqa: TID253

from peftcli.errors import InputError, RunError
from peftcli.launchers.deepspeed import offloaded, stage
from peftcli.training import state
from peftcli.training.strategies.plain import MakeOptimizer, Strategy

if TYPE_CHECKING:
    from peftcli.recipe.training_section import TrainingSection


class DeepSpeed(Strategy):
    """ZeRO-1 and 2."""

    engine: Any

    def __init__(
        self, settings: TrainingSection, config: Mapping[str, Any] | None = None, *, project_dir: Path | None = None
    ) -> None:
        super().__init__(settings, config, project_dir=project_dir)
        self.stage = stage(dict(self.config))
        self.name = f"ZeRO-{self.stage}{' with offloading' if offloaded(dict(self.config)) else ''}"
        on_cpu = self.accelerator.device.type == "cpu"
        if on_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it says that it found nothing better
        with quietly():
            import deepspeed
            import deepspeed.comm
            import deepspeed.ops

            if on_cpu:
                # Gloo sums what processes send each other; DeepSpeed's own sum would have to be compiled first.
                deepspeed.ops.__compatible_ops__ = {}
            deepspeed.init_distributed("gloo" if on_cpu else None, verbose=False)
        self._gradients: dict[nn.Parameter, Tensor] = {}

    def describe(self) -> str:
        self._check_stage()
        count = self.accelerator.num_processes
        held, whole = sum(flat.numel() for flat in self._flat()), sum(p.numel() for p in self._trained())
        if count > 1 and held >= whole:
            raise RunError(f"{self.name} shards nothing: each process optimizes all {whole:,} numbers")
        parts = {1: "optimizer state", 2: "optimizer state and gradients"}
        return f"{count} processes, {parts[self.stage]} sharded (DeepSpeed ZeRO-{self.stage}){self._main_memory()}"

    def _main_memory(self) -> str:
        """What is offloaded, for the end of a sentence.

        Raises:
            RunError: it is not what the recipe asks for.
        """
        asked, found = offloaded(dict(self.config)), self._offloaded()
        if asked != found:
            sides = (", ".join(sorted(names)) or "nothing" for names in (asked, found))
            raise RunError("the recipe asks for {} in main memory, but DeepSpeed holds {} there".format(*sides))
        words = {"offload_optimizer": "the optimizer", "offload_param": "the shards"}
        return f"; {' and '.join(words[name] for name in sorted(found))} in main memory" if found else ""

    def _offloaded(self) -> set[str]:
        """What DeepSpeed keeps in main memory, by its option's name."""
        zero = self.engine.optimizer
        return {"offload_optimizer"} if zero.cpu_offload and all_on_cpu(self._flat()) else set()

    def _check_stage(self) -> None:
        count, found = self.accelerator.num_processes, self.engine.zero_optimization_stage()
        if found != self.stage or self.engine.dp_world_size != count:
            raise RunError(
                f"the recipe asks for ZeRO-{self.stage} over {count} processes, but DeepSpeed runs ZeRO-{found} over "
                f"{self.engine.dp_world_size}"
            )

    # -- the model ----------------------------------------------------------------------------------------------------

    def prepare(
        self, model: nn.Module, loss: nn.Module, make_optimizer: MakeOptimizer, *, keep_gradients: bool = False
    ) -> None:
        self.model, self._keep_gradients = model, keep_gradients
        kinds = {str(p.dtype).removeprefix("torch.") for p in self._trained()}
        if len(kinds) > 1:
            raise InputError(
                f"what is trained has several types ({', '.join(sorted(kinds))}), and ZeRO flattens it into one",
                field="launcher.type",
                fix="set model.dtype to float32, or use launcher.type accelerate or fsdp",
            )
        self.optimizer = make_optimizer()
        self.names = state.parameter_names(model, self.optimizer)
        self._groups = [list(group["params"]) for group in self.optimizer.param_groups]
        self.engine = self._initialize(loss, optimizer=self.optimizer)
        self.loss = self.scoring = self.engine

    def _initialize(self, module: nn.Module, **arguments: Any) -> Any:
        """DeepSpeed's engine around a module."""
        import deepspeed

        with quietly():
            engine, *_ = deepspeed.initialize(model=module, config=dict(self.config), **arguments)
        return engine

    # -- a step -------------------------------------------------------------------------------------------------------

    def batch(self, *, last: bool) -> AbstractContextManager[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def gradient_norm(self) -> Tensor:
        return self._norm(self.engine.optimizer.scaled_global_norm())

    def _norm(self, found: Any) -> Tensor:
        norm = torch.as_tensor(found)
        return norm if norm >= 0 else torch.full_like(norm, torch.nan)  # DeepSpeed's sign of one that is not finite

    def step(self, norm: Tensor, max_norm: float) -> None:
        if self._keep_gradients:
            from deepspeed.utils import safe_get_full_grad

            factor = min(1.0, max_norm / (float(norm) + 1e-6)) if max_norm else 1.0
            self._gradients = {p: safe_get_full_grad(p) * factor for p in self._trained()}
        self.engine.step()  # clips as its config says, which is the recipe's value

    def zero_grad(self) -> None:
        self._gradients = {}  # the engine's own are gone with its step

    # -- reading and writing what is trained --------------------------------------------------------------------------

    @contextmanager
    def whole(self, *, gradients: bool = False, write: bool = False) -> Iterator[None]:
        for parameter, gradient in self._gradients.items() if gradients else ():
            parameter.grad = gradient.to(parameter.dtype)
        yield
        for parameter in self._gradients if gradients else ():
            parameter.grad = None
        for parameter in self._trained() if write else ():  # the optimizer's copies follow
            self._set(parameter, parameter.data)

    def _set(self, parameter: nn.Parameter, value: Tensor, field: str | None = None) -> None:
        """Give the optimizer this process's part of a whole value: of the parameter, or of a field of its state."""
        parameter.set_full_hp_param(value.to(torch.float32), field)  # type: ignore[attr-defined]  # DeepSpeed's

    def _flat(self) -> list[nn.Parameter]:
        """What the optimizer updates, one for each of its groups."""
        return self.engine.optimizer.single_partition_of_fp32_groups

    def _partitions(self) -> Iterator[tuple[nn.Parameter, dict[str, nn.Parameter]]]:
        """What the optimizer updates, with the parameters by name of which it holds a part."""
        names = iter(self.names)
        for flat, parameters in zip(self._flat(), self._groups, strict=True):
            yield flat, {next(names): parameter for parameter in parameters}

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        # DeepSpeed links when its first group has stepped, and finds none of the others' state.
        self._link_state()
        tensors: dict[str, Tensor] = {}
        for flat, parameters in self._partitions():
            fields = self.optimizer.state.get(flat, {})
            for name, parameter in parameters.items():
                for field, value in fields.items():
                    sharded = value.shape == flat.shape
                    full = safe_get_full_optimizer_state(parameter, field) if sharded else value.clone()
                    tensors[f"{name}/{field}"] = full
                if parameter.dtype != torch.float32:
                    tensors[f"{name}/{state.FLOAT32}"] = safe_get_full_fp32_param(parameter)
        numbers = iter(range(len(self.names)))
        groups = [
            {**group, "params": [next(numbers) for _ in parameters]}
            for group, parameters in zip(self.optimizer.param_groups, self._groups, strict=True)
        ]
        return tensors, {"groups": groups, "values": {}}

    def load_optimizer_state(self, folder: Path, plain: dict[str, Any]) -> None:
        for group, stored in zip(self.optimizer.param_groups, state.read_groups(plain), strict=True):
            group.update({key: value for key, value in stored.items() if key != "params"})
        tensors = load_file(folder / state.OPTIMIZER)
        for flat, parameters in self._partitions():
            found: dict[str, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                name, field = key.rsplit("/", 1)
                if name in parameters:
                    found.setdefault(field, {})[name] = value.to(flat.device)
            exact = found.pop(state.FLOAT32, {})
            for field, values in found.items():
                # Numbers say how many steps were done: the partition has one of them.
                numbers = [value for value in values.values() if value.dim() == 0]
                self.optimizer.state[flat][field] = max(numbers) if numbers else torch.zeros_like(flat)
            self._link_state()
            for name, value in exact.items():
                self._set(parameters[name], value)
            for field, values in found.items():
                for name, value in values.items():
                    if value.dim():
                        self._set(parameters[name], value, field)

    def _link_state(self) -> None:
        """Let DeepSpeed find the optimizer's state that is there."""
        zero = self.engine.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()

    def finish(self) -> None:
        self._destroy()
        del self._groups
        super().finish()

    def _destroy(self) -> None:
        self.engine.destroy()
        del self.engine


def all_on_cpu(tensors: Iterable[Tensor]) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)


@contextmanager
def quietly() -> Iterator[None]:
    """What DeepSpeed logs and warns of at its start is about itself."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
