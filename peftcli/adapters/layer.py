"""`AdapterLayer` stands where an adapted module stood: it holds the adapters' tensors and composes their equations.

Parameters live under PEFT's names (`q_proj.lora_A.default.weight`), the module itself under `base_layer`. Several active
adapters are composed as functions, the first named outermost, so methods of different families mix freely.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch  # noqa: TID253
import torch.nn.functional as F  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters.base import Adapter, DeltaAdapter, Tensors, TransformAdapter
from peftcli.adapters.context import BASE, ForwardContext
from peftcli.adapters.holding import TensorHolder
from peftcli.adapters.layer_names import PeftNames
from peftcli.adapters.sites import Site
from peftcli.errors import InputError


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: rotations and weights are computed in the adapter's own precision (meta tensors have none)."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class AdapterLayer(PeftNames, TensorHolder):
    """An adapted module.

    Args:
        site: the module seen as a matrix.
        context: facts about the running batch, shared by all layers of a model.
        weight_is_read: the parent reads `.weight` and never calls the module (nn.MultiheadAttention's out_proj), so
            `.weight` must be the adapted one.
    """

    base_layer: nn.Module

    def __init__(self, site: Site, context: ForwardContext, *, weight_is_read: bool = False) -> None:
        super().__init__(site, context)
        self.base_layer = site.module
        self.weight_is_read = weight_is_read
        self.merged_adapters: list[str] = []
        self.disable_adapters = False
        self._originals: dict[str, nn.Parameter | None] = {}
        self.train(site.module.training)

    def train(self, mode: bool = True) -> AdapterLayer:
        """Switch module and adapters to training (True) or evaluation.

        Not what holds the adapters' tensors, which does the same in both: its modules grow with the adapters.
        """
        for adapter in self.adapters.values():
            adapter.training = mode
        self.training = mode
        self.base_layer.train(mode)
        return self

    def leader(self, name: str) -> AdapterLayer | None:
        """The layer whose tensors an adapter uses here, or None where it has its own."""
        return self._leaders.get(name)

    def _pass_tensors(self, name: str, dropping: bool) -> Tensors:
        """`tensors` as one pass sees them: a training pass may drop some."""
        p = self.tensors(name)
        return self.adapters[name].dropped(p) if dropping else p

    def _bias(self, names: list[str]) -> Tensor | None:
        """The bias of the module with some adapters."""
        bias = self.site.bias
        for name in reversed(names):
            bias = None if bias is None else self.adapters[name].merged_bias(self.tensors(name), bias)
        return bias

    # -- forward --------------------------------------------------------------------------------------------------

    def _live(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self.adapters]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters or self.merged_adapters:
            if self.disable_adapters and self.merged_adapters:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if self.context.adapter_names is not None:
            return self._forward_mixed(*args, **kwargs)
        return self._forward(self._live(self.active_adapters), *args, **kwargs)

    def _forward(self, names: list[str], *args: Any, **kwargs: Any) -> Any:
        if not names:
            return self.base_layer(*args, **kwargs)
        if self.site.elementwise_io or all(self._acts_outside(name) for name in names):
            if all(self._folds(name) for name in names):
                return self.site.run_rebuilt(lambda: self.effective(names, dropping=self.training), *args, **kwargs)
            return self._compose(names, *args, **kwargs)
        return self.site.run(*self.effective(names, dropping=self.training), *args, **kwargs)

    def _adds(self, name: str) -> bool:
        """Whether the adapter's part is added to the module's output (so the module itself need not be re-run)."""
        return isinstance(self.adapters[name], DeltaAdapter) and self.site.kind not in ("attention", "parameter")

    def _acts_outside(self, name: str) -> bool:
        """Whether the adapter acts on what goes into or comes out of a module whose inputs are no vectors."""
        adapter = self.adapters[name]
        outputs_only = isinstance(adapter, TransformAdapter) and not adapter.acts_on_inputs
        return self._adds(name) or (outputs_only and self.site.elementwise_output)

    def _folds(self, name: str) -> bool:
        """Whether (W + dW) x is quicker than W x + dW x: dW must be built anyway, and adding it to W loses nothing."""
        adapter = self.adapters[name]
        if not isinstance(adapter, DeltaAdapter) or not adapter.builds_delta:
            return False
        exact = all(t.dtype == self.site.dtype for t in self.tensors(name).values() if t.is_floating_point())
        return exact and self.site.is_bare and not (self.training and adapter.drops)

    def _compose(self, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """f_1(f_2(... module)) on the first positional argument."""
        if not names:
            return self.base_layer(*args, **kwargs)
        name, rest = names[0], names[1:]
        if not args:  # called by keyword: nn.Linear's `input`
            args, kwargs = (kwargs.pop("input"),), kwargs
        x = args[0]
        adapter = self.adapters[name]
        if isinstance(adapter, TransformAdapter):
            p = self._pass_tensors(name, dropping=self.training)
            inputs = self._in_precision_of(p, adapter.before, x) if adapter.acts_on_inputs else x
            y = self._compose(rest, inputs, *args[1:], **kwargs)
            if not adapter.acts_on_outputs:
                return y
            bias = None if adapter.transforms_bias else self._bias(rest)
            if bias is None:
                return self._in_precision_of(p, adapter.after, y)
            bias = bias.to(y.dtype)
            return self._in_precision_of(p, adapter.after, y - bias) + bias
        together = None if rest or kwargs or len(args) > 1 else self._together(name, x)
        if together is not None:
            return together
        return self._with_update(name, self._compose(rest, *args, **kwargs), x, *args[1:], **kwargs)

    def _together(self, name: str, x: Tensor) -> Tensor | None:
        """Module and update as one operation, where they can be that and nothing is dropped or weighed."""
        adapter = self.adapters[name]
        assert isinstance(adapter, DeltaAdapter)
        if self.context.gate_scalings is not None or (self.training and adapter.drops):
            return None
        return adapter.with_module(self._pass_tensors(name, dropping=self.training), x, self.site)

    def _with_update(self, name: str, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        update = self._update(name, x, *args, **kwargs)
        return y if update is None else y + update.to(y.dtype)

    def _update(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """g dW x, with g = 1 unless a gate decides; None where it is 0."""
        adapter, p = self.adapters[name], self._pass_tensors(name, dropping=self.training)
        assert isinstance(adapter, DeltaAdapter)
        share = self.context.share(self.site.name, name)
        if isinstance(share, float) and share == 0:
            return None
        if adapter.dropout and self.training and x.is_floating_point():
            x = F.dropout(x, adapter.dropout)
        update = adapter.activation(p, x, self.site)
        if update is None:
            update = self.site.run_rebuilt(lambda: self._added(adapter, p), x, *args, **kwargs)
        keep = adapter.keep() if self.training else None
        if keep is not None:
            update = update * self.site.broadcast(keep).to(update)
        if isinstance(share, Tensor):
            share = share.reshape(*update.shape[:-1], 1).to(update)
        return update if isinstance(share, float) and share == 1 else update * share

    def _added(self, adapter: DeltaAdapter, p: Tensors) -> tuple[Tensor, Tensor | None]:
        """dW [out, in] and what is added to the bias [out], where there is one and the method changes it."""
        bias, dtype = self.site.bias, self.site.dtype
        if bias is None or type(adapter).merged_bias is Adapter.merged_bias:
            return adapter.delta(p).to(dtype), None
        return adapter.delta(p).to(dtype), (adapter.merged_bias(p, bias) - bias).to(dtype)

    @staticmethod
    def _in_precision_of(p: Tensors, function: Any, x: Tensor) -> Tensor:
        """Apply a transform in the adapter's precision and come back to the module's: the one place of such casts."""
        with full_precision(x.device):
            return function(p, x.to(torch.promote_types(p.dtype, x.dtype))).to(x.dtype)

    def _forward_mixed(self, *args: Any, **kwargs: Any) -> Any:
        """Rows of different adapters in one batch: the module runs once, each group of rows gets its own adapter."""
        if self.site.kind == "attention":
            raise InputError(
                "`adapter_names` can't be used with an adapted nn.MultiheadAttention", place=self.site.name
            )
        x = args[0]
        output = self.base_layer(*args, **kwargs)
        for name, rows in self.context.rows_by_adapter(x.shape[0]).items():
            if name == BASE or name not in self.adapters:
                continue
            index = torch.tensor(rows, device=x.device)
            inputs = x.index_select(0, index)
            with self.context.only(rows, of=x.shape[0]):
                if not self._adds(name):
                    adapted = self._forward([name], inputs, *args[1:], **kwargs)
                    output = output.index_copy(0, index, adapted)
                elif (update := self._update(name, inputs, *args[1:], **kwargs)) is not None:
                    add = output.index_add if torch.is_grad_enabled() or not self.site.is_bare else output.index_add_
                    output = add(0, index, update.to(output.dtype))
        return output

    @property
    def weight(self) -> Tensor:
        return self.effective()[0] if self.weight_is_read else self.site.stored

    @property
    def bias(self) -> Tensor | None:
        return self.effective()[1] if self.weight_is_read else self.site.bias

    # -- weights --------------------------------------------------------------------------------------------------

    def effective(self, names: list[str] | None = None, *, dropping: bool = False) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in] and bias [out] that do what module + adapters do, in the module's dtype."""
        if names is None:
            idle = self.disable_adapters or self.merged_adapters
            names = [] if idle else self._live(self.active_adapters)
        weight, bias = self.site.weight(), self.site.bias
        with full_precision(weight.device):
            for name in reversed(names):  # the last named is innermost
                adapter, p = self.adapters[name], self._pass_tensors(name, dropping)
                dtype = torch.promote_types(p.dtype, weight.dtype)
                weight = adapter.merged_weight(p, weight.to(dtype))
                bias = None if bias is None else adapter.merged_bias(p, bias.to(dtype))
        return weight.to(self.site.dtype), None if bias is None else bias.to(self.site.dtype)

    def get_delta_weight(self, name: str) -> Tensor:
        """What merging the adapter would add to the stored weight, in the layout the module stores."""
        with torch.no_grad():
            return self.site.to_stored(self.effective([name])[0] - self.site.weight())

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapted weight in the module's place. The original parameter is kept, so `unmerge` is exact."""
        asked = dict.fromkeys(self.active_adapters if adapter_names is None else adapter_names)  # once each
        wanted = [name for name in self._live(asked) if name not in self.merged_adapters]
        if not wanted:
            return
        for name in wanted:
            problem = self.adapters[name].merge_problem()
            if problem:
                raise InputError(problem, place=self.site.name)
        names = self.merged_adapters + wanted
        self.unmerge()  # what is merged already is merged again with the rest, from the original weight
        if not self._share_merged(names):
            self._replace_weight(names, safe_merge)
        self.merged_adapters = names

    def _replace_weight(self, names: list[str], safe_merge: bool) -> None:
        weight, bias = self.effective(names)
        if safe_merge and not torch.isfinite(weight).all():
            raise InputError(
                f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken",
                place=self.site.name,
            )
        replacement = self.site.merged_module(weight, bias)
        if replacement is not None:
            self.__dict__["_replaced"] = self.base_layer  # out of the module tree while it is merged
            self.base_layer = replacement
        else:
            self._swap(self.site.parameter, self.site.to_stored(weight).contiguous())
            if bias is not None and bias is not self.site.bias:
                self._swap(self.site.bias_parameter, bias)

    def _share_merged(self, names: list[str]) -> bool:
        """Take the merged weight of the layer this one follows, so that tied modules stay tied; False if they differ."""
        leader = self.leader(names[0])
        if leader is None or any(self.leader(name) is not leader for name in names):
            return False
        leader.merge(adapter_names=names)
        if leader.merged_adapters != names:
            return False
        self._swap(self.site.parameter, leader.site.stored)
        return True

    def _swap(self, parameter: str, value: Tensor) -> None:
        held = self.site.module._parameters
        if value is not held.get(parameter):
            self._originals.setdefault(parameter, held[parameter])
            held[parameter] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)

    def unmerge(self) -> None:
        """Put the original parameters back: bit-exact, whatever was merged."""
        self.base_layer = self.__dict__.pop("_replaced", self.base_layer)
        self.site.module._parameters.update(self._originals)
        self._originals.clear()
        self.merged_adapters.clear()

    def forget_originals(self) -> None:
        """Make the merge final and free the original parameters."""
        self._originals.clear()


BaseTunerLayer = AdapterLayer
"""PEFT's name, for `isinstance`."""


class AttentionLayer(AdapterLayer):
    """An adapted nn.MultiheadAttention."""

    @property
    def in_proj_weight(self) -> Tensor:
        """nn.TransformerEncoderLayer's fast path reads this instead of calling the attention."""
        return self.effective()[0]

    @property
    def in_proj_bias(self) -> Tensor | None:
        return self.effective()[1]


def layer_for(site: Site, context: ForwardContext, *, weight_is_read: bool = False) -> AdapterLayer:
    """The layer that adapts a site."""
    from peftcli.adapters.module_layer import ModuleLayer

    special: dict[str, type[AdapterLayer]] = {"attention": AttentionLayer, "module": ModuleLayer}
    kind = special.get(site.kind, AdapterLayer)
    return kind(site, context, weight_is_read=weight_is_read)
