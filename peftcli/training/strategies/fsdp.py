"""FSDP2: the base sharded over the processes, gathered one layer at a time.

A unit is one of the model's repeated layers. What is left (embeddings, last norm, head) is the root's, and stays gathered
from the root's forward to the end of its backward pass, so that a loss in chunks may call the head as often as it likes.

What an adapter owns is not sharded. Every process has it whole, and gradients are averaged once a window, as DDP does:
it is a small part of the memory, methods may read their tensors anywhere (AdaLoRA's penalty, banks that all layers
share), every optimizer works on it, and an adapter in float32 may sit on a base in bfloat16. With the method `full`
everything is sharded, moments too.

Weights are gathered in the type they are stored in; `training.bf16` computes in bfloat16 by autocast, as under every
other strategy, so that all of them train the same adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch  # noqa: TID253
import torch.distributed as dist  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253
from torch.distributed.device_mesh import init_device_mesh  # noqa: TID253
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard  # noqa: TID253
from torch.distributed.tensor import DTensor, Shard, distribute_tensor  # noqa: TID253
from torch.nn.utils import get_total_norm  # noqa: TID253

from peftcli.adapters.engine import attached_to, base_modules, user_model
from peftcli.errors import InputError, RunError
from peftcli.recipe.training_section import TrainingSection
from peftcli.training import state
from peftcli.training.shared_base import load_mapped, return_freed_blocks
from peftcli.training.strategies.plain import MakeOptimizer, Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftcli.recipe.schema import ModelSection, QuantizationSection


class FullyShardedDataParallel(Strategy):
    """See the module. `config` is the section `fsdp_config` of a launcher file, completed."""

    shards_base = True
    root: FSDPModule

    def __init__(
        self, settings: TrainingSection, config: Mapping[str, Any] | None = None, *, project_dir: Path | None = None
    ) -> None:
        super().__init__(settings, config, project_dir=project_dir)
        if not dist.is_initialized():
            raise RunError("the launcher set up no process group: there is nothing to shard over")
        self.name = "FSDP2"
        self.scratch = project_dir.parent if project_dir else Path()
        return_freed_blocks()
        self.device = self.accelerator.device
        self.mesh = init_device_mesh(self.device.type, (self.accelerator.num_processes,))
        self._last = True

    # -- the model ----------------------------------------------------------------------------------------------------

    def load_base(self, model: ModelSection, quantization: QuantizationSection | None) -> PreTrainedModel:
        # In main memory: initialisers read weights before they are sharded, and layers go to the device one by one.
        return load_mapped(model, quantization, self.scratch)

    def prepare(
        self, model: nn.Module, loss: nn.Module, make_optimizer: MakeOptimizer, *, keep_gradients: bool = False
    ) -> None:
        self.model, self.loss, self.scoring = model, loss, loss
        self._shard(loss)
        self.optimizer = make_optimizer()
        self.names = state.parameter_names(model, self.optimizer)

    def _shard(self, root: nn.Module) -> None:
        """Shard the base in `root` (the model, or what wraps it) unit by unit; the rest is the same in every process."""
        whole = self._not_sharded(root)
        self._share([*(p for p in root.parameters() if p in whole), *root.buffers()])
        layers = find_layers(self.model, self.config["fsdp_transformer_layer_cls_to_wrap"])
        for layer in reversed(layers):  # inner ones first
            layer.to(self.device)
            self._shard_unit(layer, whole, self.config["fsdp_reshard_after_forward"])
        inner = {p for layer in layers for p in layer.parameters()}
        for parameter in root.parameters():
            if parameter not in inner:
                parameter.data = parameter.data.to(self.device)
        self._shard_unit(root, whole, None)  # needed again at once: stays gathered between forward and backward
        self.root = cast(FSDPModule, root)
        self._in_root = [p for p in root.parameters() if isinstance(p, DTensor) and p not in inner]

    def _shard_unit(self, unit: nn.Module, whole: set[nn.Parameter], reshard: bool | None) -> None:
        types = {p.dtype for p in unit.parameters() if p.requires_grad and p not in whole}
        if len(types) > 1:
            raise InputError(
                f"FSDP trains weights of one type; {type(unit).__name__} has {', '.join(sorted(map(str, types)))}",
                field="model.dtype",
                fix="name one type",
            )
        on_cpu = self.config["fsdp_offload_params"]
        fully_shard(
            unit,
            mesh=self.mesh,
            reshard_after_forward=reshard,
            offload_policy=CPUOffloadPolicy(pin_memory=self.device.type != "cpu") if on_cpu else OffloadPolicy(),
            ignored_params=whole,
        )

    def _not_sharded(self, root: nn.Module) -> set[nn.Parameter]:
        """What every process has whole. (A function, so that nobody holds the base's weights while they are sharded.)"""
        managed = base_parameters(self.model)
        return {p for p in root.parameters() if p not in managed}

    def _share(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values of what stays whole."""
        for tensor in tensors:
            tensor.data = tensor.data.to(self.device)
            dist.broadcast(tensor.data, src=0)

    def describe(self) -> str:
        size, sharded, own = self.mesh.size(), 0, 0
        managed = base_parameters(self.model)
        for name, parameter in self.model.named_parameters():
            if parameter not in managed:
                continue
            if (
                not isinstance(parameter, DTensor)
                or parameter.placements != (Shard(0),)
                or parameter.device_mesh.size() != size
            ):
                raise RunError(f"{name} is not sharded over {size} processes, as launcher.type fsdp asks for")
            sharded, own = sharded + parameter.numel(), own + parameter.to_local().numel()
        if size > 1 and own == sharded:
            raise RunError(f"{size} processes came up, but this one holds the whole base")
        return f"{size} processes share the base (FSDP2): {own:,} of its {sharded:,} values are here"

    # -- a step -------------------------------------------------------------------------------------------------------

    def batch(self, *, last: bool) -> AbstractContextManager[None]:
        # Sharded gradients are reduced after every batch: to keep them whole for a window would undo the sharding.
        self._last = last
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        if self._last:
            average([p for p in self._trained() if not isinstance(p, DTensor)], self.mesh.size())

    def gradient_norm(self) -> Tensor:
        gradients = [p.grad for p in self._trained() if p.grad is not None]
        own = get_total_norm([g.to_local() for g in gradients if isinstance(g, DTensor)])
        squares = own.to(self.device, torch.float64).square()
        dist.all_reduce(squares)
        plain = get_total_norm([g for g in gradients if not isinstance(g, DTensor)])
        return (squares + plain.to(squares).square()).sqrt().to(plain.dtype)

    def step(self, norm: Tensor, max_norm: float) -> None:
        scale = max_norm / (float(norm) + 1e-6) if max_norm else 1.0  # clip_grad_norm_'s
        if scale < 1:
            for parameter in self._trained():
                if parameter.grad is not None:
                    local(parameter.grad).mul_(scale)
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    # -- reading and writing what is trained --------------------------------------------------------------------------

    @contextmanager
    def whole(self, *, gradients: bool = False, write: bool = False) -> Iterator[None]:
        self.root.reshard()  # an evaluation leaves it gathered
        trained = [p for p in self._trained() if isinstance(p, DTensor)]
        with self._gathered({*trained, *self._in_root}, gradients) as pairs:
            yield
        if write:
            for parameter in self._trained():
                if not isinstance(parameter, DTensor):
                    dist.broadcast(parameter.data, src=0)
            for parameter in trained:
                self._write(parameter, pairs[parameter].data)

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        self.root.reshard()
        with self._gathered(self._in_root):
            yield

    @contextmanager
    def loaded(self, model: nn.Module) -> Iterator[None]:
        self.model = model
        self._shard(model)
        yield

    def finish(self) -> None:
        for name in ("root", "_in_root"):
            self.__dict__.pop(name, None)
        super().finish()

    @contextmanager
    def _gathered(
        self, parameters: Iterable[nn.Parameter], gradients: bool = False
    ) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
        """While open, whole parameters stand in the places of sharded ones; gives them by the sharded ones."""
        wanted = set(parameters)
        places = [(m._parameters, n) for m in self.model.modules() for n, p in m._parameters.items() if p in wanted]
        pairs: dict[nn.Parameter, nn.Parameter] = {}
        for table, name in places:  # the same order in every process
            sharded = cast(nn.Parameter, table[name])
            if sharded not in pairs:
                pairs[sharded] = nn.Parameter(self._whole(sharded), sharded.requires_grad)
                if gradients and sharded.grad is not None:
                    pairs[sharded].grad = self._whole(sharded.grad)
            table[name] = pairs[sharded]
        back = {id(p): sharded for sharded, p in pairs.items()}
        try:
            yield pairs
        finally:
            for table, name in places:
                table[name] = back[id(table[name])]

    def _whole(self, tensor: Tensor) -> Tensor:
        """A sharded tensor gathered on the device (its shards may lie on the CPU)."""
        sharded = cast(DTensor, tensor.detach())
        how: dict[str, Any] = {"run_check": False, "shape": sharded.shape, "stride": sharded.stride()}
        return DTensor.from_local(
            sharded.to_local().to(self.device), self.mesh, sharded.placements, **how
        ).full_tensor()

    def _write(self, parameter: Tensor, values: Tensor) -> None:
        """Put the first process's whole `values` into a sharded parameter."""
        shards = distribute_tensor(values.to(self.device), self.mesh, cast(DTensor, parameter).placements)
        local(parameter.detach()).copy_(shards.to_local())

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, plain = super().optimizer_state()
        return {name: self._whole(t) if isinstance(t, DTensor) else t for name, t in tensors.items()}, plain

    def load_optimizer_state(self, folder: Path, plain: dict[str, Any]) -> None:
        super().load_optimizer_state(folder, plain)
        for parameter, entry in self.optimizer.state.items():
            for field, value in entry.items():
                if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
                    entry[field] = torch.zeros_like(parameter)
                    self._write(entry[field], value)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, or all of a plain one; writes go through."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def average(parameters: Iterable[nn.Parameter], processes: int) -> None:
    """Average gradients over the processes, all of a type in one message.

    One that has a gradient in some processes only is averaged with zeros; one that has none anywhere gets none.
    """
    by_type: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_type.setdefault(parameter.dtype, []).append(parameter)
    for group in by_type.values():
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        present = torch.tensor([float(p.grad is not None) for p in group]).to(parts[0])
        message = torch.cat([part.reshape(-1) for part in parts] + [present]) / processes
        dist.all_reduce(message)
        *averaged, present = message.split([part.numel() for part in parts] + [len(group)])
        for parameter, gradient, share in zip(group, averaged, present.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter) if share else None


def base_parameters(model: nn.Module) -> set[nn.Parameter]:
    """What is sharded: the base's parameters; without adapters all of them."""
    base = user_model(model)
    owned = {p for _, m in base_modules(base) for p in m._parameters.values() if p is not None}
    adapted = attached_to(base) is not None
    return {p for p in owned if not (adapted and p.requires_grad)}  # biases are trained in the base's modules


def find_layers(model: nn.Module, names: Iterable[str] | None) -> list[nn.Module]:
    """The repeated layers of a model, in its order.

    Args:
        names: of their classes; None: those the model's author says not to split, else classes that fill a ModuleList.

    Raises:
        InputError: there are none.
    """
    base = user_model(model)
    blocks = {type(m[0]).__name__ for m in base.modules() if isinstance(m, nn.ModuleList) and len({*map(type, m)}) == 1}
    wanted = set(names or getattr(base, "_no_split_modules", None) or blocks)
    layers = [module for _, module in base_modules(base) if type(module).__name__ in wanted]
    if not layers:
        raise InputError(
            f"the model has no layers of the class {', '.join(sorted(wanted)) or '(it has no repeated layers)'}",
            field="launcher.config: fsdp_transformer_layer_cls_to_wrap",
            allowed=", ".join(sorted(blocks)) or None,
        )
    return layers
