"""X-LoRA's gate at work: a first pass gives hidden states, the gate turns them into weights, the layers read those.

The weights stand in the `ForwardContext`. Reentrant checkpointing runs a block again in a backward pass of its own, where
the gate's graph must not be entered (it would be freed by the first block): there the layers read a detached copy, whose
gradient goes on to the gate at the place in the graph that comes last in the backward pass, the input embeddings.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters import checkpoint, kv_cache
from peftcli.adapters.attach import Placement, attach
from peftcli.adapters.config import CONFIG_NAME, read_config
from peftcli.adapters.engine import Attached, attached_to, embeddings
from peftcli.adapters.methods.lora import LoraConfig
from peftcli.adapters.methods.xlora import XLora, XLoraConfig
from peftcli.errors import InputError

OUTER_ARGUMENTS = ("labels", "logits_to_keep", "num_items_in_batch", "output_hidden_states", "return_dict", "use_cache")
"""Arguments of a model with a head that the first pass, which needs no head, leaves out or sets itself."""


class Weights:
    """The experts' weights in one forward pass.

    Args:
        weights: [B, T, layers, experts].
        places: number of each adapted module, by its path.
        experts: their names, in order.
    """

    def __init__(self, weights: Tensor, places: dict[str, int], experts: list[str]) -> None:
        self.weights, self.places, self.experts = weights, places, experts
        self.copy: Tensor | None = None

    def __call__(self, site: str, expert: str) -> Tensor:
        """The weights [B, T] of an expert at a module."""
        weights = self.weights
        if torch._C._current_graph_task_id() != -1:  # a checkpointed block is recomputed
            if self.copy is None:
                self.copy = weights.detach().requires_grad_(weights.requires_grad)
            weights = self.copy
        return weights[:, :, self.places[site], self.experts.index(expert)]

    def join(self, embedded: Tensor) -> Tensor:
        """`embedded`, with a backward pass that hands the copy's gradient to the gate."""
        return _Join.apply(embedded, self.weights, self) if torch.is_grad_enabled() else embedded


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embedded: Tensor, weights: Tensor, owner: Weights) -> Tensor:
        ctx.owner = owner
        return embedded.view_as(embedded)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        copy, ctx.owner.copy = ctx.owner.copy, None
        return gradients[0], None if copy is None else copy.grad, None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for a while: no dropout, and no checkpointing of what has no backward pass."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Gate(nn.Module):
    """The gate of one model and PEFT's names for what can be asked of it.

    Args:
        attached: the model's adapters, experts among them.
        name: the gate's own adapter name.
        config: its config.
    """

    PUBLIC: ClassVar[frozenset[str]] = frozenset(
        {
            *("set_topk_lora", "get_topk_lora", "set_global_scaling_weight", "get_global_scaling_weight"),
            *("set_scaling_pass_value", "get_latest_scalings", "get_scalings_log", "get_bucketed_scalings_log"),
            *("enable_scalings_logging", "disable_scalings_logging", "clear_scalings_log"),
        }
    )
    """What a PeftModel answers for its gate."""

    def __init__(self, attached: Attached, name: str, config: XLoraConfig) -> None:
        super().__init__()
        self.attached, self.name, self.config = attached, name, config
        self.experts = sorted(config.adapters)  # as in the saved config, whose keys are sorted: the gate's columns
        self.places = {layer.site.name: place for place, (_, layer) in enumerate(attached.layers())}
        self.method = XLora(config, len(self.places))
        self.layers = self.method.network()
        self.latest: Tensor | None = None
        self.log: list[Tensor] = []
        self.is_logging = False

    def forward(self, hidden: Tensor) -> Tensor:
        """Scalings [B, T, layers, experts] for hidden states [B, T, hidden]."""
        return self.method.scalings(self.layers(hidden.to(next(self.parameters()).dtype)))

    # -- hooks ----------------------------------------------------------------------------------------------------

    def before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the model: the first pass, and the weights for the second."""
        context = self.attached.context
        context.gate_scalings = None
        if self.attached.disabled or self.name not in self.attached.active:
            return None
        if kwargs.get("use_cache") or kv_cache.given(kwargs) is not None:
            raise InputError("`use_cache` must be False: the gate reads the whole sequence", field="use_cache")
        scalings = self(self._first_pass(model, args, kwargs))
        self.latest = scalings.detach()
        if self.is_logging:
            self.log.append(self.latest)
        weights = Weights(self.method.weights(scalings), self.places, self.experts)
        context.gate_scalings = weights
        if kwargs.get("inputs_embeds") is not None:
            kwargs = kwargs | {"inputs_embeds": weights.join(kwargs["inputs_embeds"])}
        return args, kwargs

    def after_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the input embeddings."""
        weights = self.attached.context.gate_scalings
        return weights.join(output) if isinstance(weights, Weights) else output

    def _first_pass(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The last hidden states [B, T, hidden] with all experts at `scaling_pass_value`."""
        given = dict(inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        inputs = {name: value for name, value in given.items() if name not in OUTER_ARGUMENTS}
        run = model.forward if model.base_model is model else model.base_model  # the former would call this hook again
        context, value = self.attached.context, self.config.scaling_pass_value * self.config.global_scaling_weight
        context.gate_scalings = lambda site, expert: value
        try:
            with torch.no_grad(), evaluating(model):
                output = run(**inputs, output_hidden_states=True, return_dict=True, use_cache=False)
        finally:
            context.gate_scalings = None
        return output.hidden_states[-1]

    # -- PEFT's names ---------------------------------------------------------------------------------------------

    def set_topk_lora(self, value: int | None) -> None:
        """How many experts a token gets; None for all."""
        self.config.top_k_lora = value

    def get_topk_lora(self) -> int | None:
        return self.config.top_k_lora

    def set_global_scaling_weight(self, weight: float) -> None:
        """The factor on all weights."""
        self.config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        return self.config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Every expert's weight in the first pass; None shares 1 among them."""
        self.config.scaling_pass_value = 1 / len(self.experts) if value is None else value

    def get_latest_scalings(self) -> Tensor | None:
        """What the gate predicted last, [B, T, layers, experts]."""
        return self.latest

    def get_scalings_log(self) -> list[Tensor]:
        """Predictions since logging was enabled, one [B, T, layers, experts] for each forward pass."""
        return list(self.log)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The log by sequence length: positions in the log, and the predictions."""
        buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
        for position, scalings in enumerate(self.log):
            positions, tensors = buckets.setdefault(scalings.shape[1], ([], []))
            positions.append(position)
            tensors.append(scalings)
        return buckets

    def enable_scalings_logging(self) -> None:
        self.is_logging = True

    def disable_scalings_logging(self) -> None:
        """Stop logging; the log stays."""
        self.is_logging = False

    def clear_scalings_log(self) -> None:
        self.log.clear()


class _CacheOff:
    """A model's key and value cache switched off in its configs; `remove` puts back what was there."""

    def __init__(self, model: Any) -> None:
        configs: list[Any] = [model.config, getattr(model, "generation_config", None)]
        self.before = [(config, config.use_cache) for config in configs if hasattr(config, "use_cache")]
        for config, _ in self.before:
            config.use_cache = False

    def remove(self) -> None:
        for config, value in self.before:
            config.use_cache = value


def attach_gate(
    model: nn.Module,
    config: XLoraConfig,
    name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    initialize: bool = True,
) -> Attached:
    """Load the experts and put a gate over them. Arguments as for `attach`.

    Raises:
        InputError: if an expert can't be loaded or is no plain LoRA of tokens; the model is then left as it was.
    """
    config.check()
    _check(model, config, name)
    try:
        for expert, path in config.adapters.items():
            _attach_expert(model, config, expert, path, autocast_adapter_dtype)
    except InputError:
        attached = attached_to(model)
        if attached is not None:
            attached.unload(merge=False)
        raise
    attached = attached_to(model)
    assert attached is not None
    words = embeddings(model)[0]
    assert words is not None
    base = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    gate = Gate(attached, name, config).to(base.device, Placement(autocast_adapter_dtype).dtype(base.dtype))
    attached.configs[name] = config
    attached.gates[name] = gate
    attached.hooks += [
        model.register_forward_pre_hook(gate.before_model, with_kwargs=True),
        words.register_forward_hook(gate.after_embedding),
        _CacheOff(model),
    ]
    attached.set_active([name], trainable=not config.inference_mode)
    return attached


def _check(model: Any, config: XLoraConfig, name: str) -> None:
    """Refuse what can't have a gate; fill in the hidden size."""
    if attached_to(model) is not None:
        raise InputError("X-LoRA must be the model's only adapter", field="adapter_name")
    if not hasattr(model, "base_model") or embeddings(model)[0] is None:
        raise InputError(f"X-LoRA needs a transformers model, not {type(model).__name__}")
    if not config.adapters:
        raise InputError("names no LoRA to weigh", field="adapters", allowed="a name and a folder for each")
    if name in config.adapters:
        raise InputError(f"{name!r} is the gate's own name", field="adapters")
    size = model.config.get_text_config().hidden_size
    if config.hidden_size not in (None, size):
        raise InputError(f"is {config.hidden_size}, but the model's is {size}", field="hidden_size", allowed=str(size))
    config.hidden_size = size


def _attach_expert(model: nn.Module, config: XLoraConfig, name: str, path: str, autocast: bool) -> None:
    folder = checkpoint.resolve_adapter_folder(path)
    lora = read_config(folder / CONFIG_NAME)
    if not isinstance(lora, LoraConfig):
        raise InputError(f"is {lora.peft_type}; X-LoRA weighs LoRA only", place=folder, field=name)
    if lora.variant:
        kind = "DoRA" if lora.variant == "use_dora" else lora.variant
        raise InputError(f"X-LoRA currently does not support LoRA layers with {kind}", place=folder, field=name)
    lora.inference_mode = config.inference_mode or not config.use_trainable_adapters
    tensors = checkpoint.read_tensors(folder)
    attached = attach(model, lora, name, autocast_adapter_dtype=autocast, initialize=False)
    checkpoint.load_state(attached, name, tensors, place=folder)
    for module, layer in attached.layers():
        if layer.site.kind not in ("linear", "embedding"):
            raise InputError(f"a gate weighs tokens; a {layer.site.kind} module sees none", place=module)
