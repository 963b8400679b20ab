"""What a training step holds in memory, found by running one on tensors without data.

A fake tensor knows its shape, type and device and holds nothing. Model, adapter, loss, backward pass and optimizer are the
real ones, so what is counted follows from the code that will run: the attention kernel, checkpointed layers, the method of
the adapter, logits in chunks. Not seen is what an operation needs inside itself (the workspace of a matrix product), and
what the allocator makes of it all.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: TID253
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: TID253
from torch.utils._pytree import tree_leaves  # noqa: TID253

from peftcli.recipe.schema import Recipe
from peftcli.recipe.training_section import TrainingSection
from peftcli.training.loop import checkpoint_activations, uses_autocast
from peftcli.training.losses import linear_cross_entropy, linear_scores, tapped
from peftcli.training.model import open_base
from peftcli.training.optimizers import build_optimizer
from peftcli.training.outline import adapted
from peftcli.training.quantized import quantized_bytes
from peftcli.training.sparing import kept_activations
from peftcli.training.strategies.fsdp import find_layers
from peftcli.training.unpadded import Unpadded

OPTIMIZER_BYTES = {"adamw_8bit": 2, "paged_adamw_8bit": 2, "paged_adamw_32bit": 8}
"""Bytes of state a parameter, for optimizers whose kernels can't run without data."""

HEAP_BLOCK = 32 << 20
"""glibc serves smaller blocks from its heap, larger ones straight from the system."""


@dataclass(frozen=True)
class BatchShape:
    """The heaviest batch of a data set.

    Attributes:
        rows: rows.
        length: tokens of each, padding included.
        labels: tokens that are learnt, over all rows.
        samples: tokens of each sample, of which a row of a packed batch holds several.
    """

    rows: int
    length: int
    labels: int
    samples: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(self.samples) or self.rows * self.length


@dataclass(frozen=True)
class Footprint:
    """Bytes a training step needs on one device.

    Attributes:
        base: weights and buffers of the base; this process's part where it is sharded.
        gathered: of a sharded base, what is whole at one moment.
        adapter: tensors of the adapter, trained or not.
        gradients: of what is trained.
        optimizer: its state.
        activations: most that the passes hold between operations, without logits.
        logits: most that the head holds, forward and backward.
        peak: most of all of these at one moment, which need not be the sum of each part's own.
        forward: allocated in blocks from the heap during one forward pass, freed ones too.
        offloaded: names of those of these that are not there but in main memory, and not in `peak`.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    peak: int
    forward: int
    gathered: int = 0
    offloaded: tuple[str, ...] = ()


class LiveBytes(TorchDispatchMode):
    """While entered, follows the storages that operations make.

    Args:
        known: tensors that are not counted: parameters and buffers.
        vocabulary: tensors with this last dimension are logits.
    """

    def __init__(self, known: Iterable[Tensor], vocabulary: int) -> None:
        super().__init__()
        self._known = {_key(tensor) for tensor in known}
        self._vocabulary = vocabulary
        self._sizes: dict[int, tuple[int, bool]] = {}
        self._logits = self._others = 0
        self.peak = self.peak_logits = self.peak_others = self.from_heap = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for item in tree_leaves(made):
            if isinstance(item, Tensor):
                self._count(item)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._sizes or key in self._known:
            return
        size, is_logits = storage.nbytes(), tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary
        self._sizes[key] = size, is_logits
        weakref.finalize(storage, self._forget, key)
        self._add(size, is_logits)
        if size < HEAP_BLOCK:
            self.from_heap += size

    def _forget(self, key: int) -> None:
        size, is_logits = self._sizes.pop(key)
        self._add(-size, is_logits)

    def _add(self, size: int, is_logits: bool) -> None:
        if is_logits:
            self._logits += size
        else:
            self._others += size
        self.peak_logits, self.peak_others = max(self.peak_logits, self._logits), max(self.peak_others, self._others)
        self.peak = max(self.peak, self._logits + self._others)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def footprint(
    recipe: Recipe,
    train: BatchShape,
    evaluation: BatchShape | None = None,
    *,
    device: torch.device,
    sharded_over: int = 1,
    offloaded: Collection[str] = (),
) -> Footprint:
    """Run a step of the recipe's training, and of its evaluation, without data.

    Args:
        recipe: what to run.
        train: the heaviest training batch.
        evaluation: the heaviest evaluation batch.
        device: where the run will be.
        sharded_over: processes that share the base (FSDP); the method `full` shares gradients and moments, too.
        offloaded: of `base`, `gradients` and `optimizer`, what is in main memory, where that is not the device's.

    Raises:
        InputError: the base can't be used, or the adapter does not fit it.
        Exception: of any kind, where the model's course depends on values or an operation knows no shapes.
    """
    with torch.device("meta"):
        base = open_base(recipe.model).empty()
        base_bytes = _bytes([*base.parameters(), *base.buffers()])
        # The base here is whole; codes and scales are counted instead, and one weight expanded at a time.
        saved, expanded = quantized_bytes(recipe.quantization, base) if recipe.quantization else (0, 0)
        at_once = _gathered(base, saved) if sharded_over > 1 else 0
        model = _trained(base, recipe)
    with FakeTensorMode(), torch.device(device):
        _make_fake(model)
        held = [*model.parameters(), *model.buffers()]
        adapter = 0 if recipe.adapter.config is None else _bytes(held) - base_bytes
        vocabulary = base.config.get_text_config().vocab_size
        checkpointing = recipe.training.gradient_checkpointing
        if checkpointing:
            checkpoint_activations(model)
        step, attention = LiveBytes(held, vocabulary), Unpadded(model)
        with step, kept_activations(model, checkpointing=checkpointing, sharded=sharded_over > 1):
            loss = _loss(model, train, recipe.training, attention)
            forward = step.from_heap
            loss.backward()
            del loss
        attention.release()
        gradients = _bytes(p.grad for p in model.parameters() if p.grad is not None)
        peak, activations, logits = step.peak, step.peak_others, step.peak_logits
        if recipe.training.gradient_accumulation_steps > 1:
            peak += gradients  # those of the window's batches before
        state = _optimizer_state(model, recipe.training)
        # The step comes when activations are gone; on accelerators it holds a copy of what it updates.
        peak_of_step = gradients + (0 if device.type == "cpu" or "optimizer" in offloaded else gradients)
        peak = state + max(peak, peak_of_step)
        if evaluation is not None and evaluation.tokens > train.tokens:
            model.zero_grad()
            watch = LiveBytes(held, vocabulary)
            with watch, torch.no_grad():
                _loss(model.eval(), evaluation, recipe.training, attention)
            peak = max(peak, state + watch.peak)
            activations, logits = max(activations, watch.peak_others), max(logits, watch.peak_logits)
    base_bytes = -(-(base_bytes - saved) // sharded_over)
    if sharded_over > 1 and recipe.adapter.config is None:
        peak -= gradients + state
        gradients, state = -(-gradients // sharded_over), -(-state // sharded_over)
        peak += gradients + state + at_once  # a layer's gradients are whole until they are reduced
    peak += base_bytes + at_once + adapter + expanded
    parts = Footprint(base_bytes, adapter, gradients, state, activations, logits, peak, forward, at_once)
    moved = sum(getattr(parts, name) for name in offloaded)
    return replace(parts, peak=peak - moved, offloaded=tuple(sorted(offloaded)))


def _trained(base: nn.Module, recipe: Recipe) -> nn.Module:
    """The base with its adapter, or with every weight trainable."""
    config = recipe.adapter.config
    model = base.requires_grad_() if config is None else adapted(base, config, recipe.model.task_type)
    return model.train()


def _gathered(base: nn.Module, saved: int) -> int:
    """Bytes of a sharded base that are whole at once: what is in no layer, and two layers, one used and one on its way.

    Args:
        saved: bytes that the layers take less because they are quantised.
    """
    layers = [_bytes(layer.parameters()) for layer in find_layers(base, None)]
    total = _bytes(base.parameters())
    return total - sum(layers) + int(2 * max(layers) * (1 - saved / sum(layers)))


def _make_fake(model: nn.Module) -> None:
    """Exchange tensors on the meta device, which have no attention kernel, for fake ones on the current device.

    The adapter is attached before: its setting up copies and converts modules, which fake tensors do not support.
    """
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in tables:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)


def _loss(model: Any, batch: BatchShape, settings: TrainingSection, attention: Unpadded) -> Tensor:
    """The loss of a batch, as `CausalLMLoss` computes it once it has found the head.

    `attention` stays switched, to be released: checkpointed layers run again in the backward pass.
    """
    without_padding = bool(batch.samples) and attention.conceivable()
    inputs = _laid_out(batch) if without_padding else _padded(batch)
    labels = torch.zeros(batch.labels, dtype=torch.long)
    autocast = torch.autocast(labels.device.type, torch.bfloat16) if uses_autocast(model, settings) else nullcontext()
    head = model.get_output_embeddings()
    if without_padding:
        attention.switch()
    with autocast:
        with tapped(head, lambda hidden: hidden[..., :1]) as seen:
            model(**inputs, use_cache=False)
        hidden = seen[0].flatten(0, -2)[: batch.labels]
        if not torch.is_grad_enabled():
            return linear_scores(hidden, labels, head)
        return linear_cross_entropy(hidden, labels, head, leaves=[p for p in head.parameters() if p.requires_grad])


def _padded(batch: BatchShape) -> dict[str, Any]:
    ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _laid_out(batch: BatchShape) -> dict[str, Any]:
    """What `unpadded` makes of a batch: its samples end to end."""
    ids = torch.zeros(1, sum(batch.samples), dtype=torch.long)
    ends = torch.zeros(len(batch.samples) + 1, dtype=torch.int32)
    longest, sizes = max(batch.samples), list(batch.samples)
    lengths = {"segment_lengths": sizes, "max_length_q": longest, "max_length_k": longest}
    return {
        "input_ids": ids,
        "position_ids": torch.zeros_like(ids),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        **lengths,
    }


def _optimizer_state(model: nn.Module, settings: TrainingSection) -> int:
    """Bytes the optimizer keeps, found by stepping one parameter of each shape."""
    trained = [p for p in model.parameters() if p.grad is not None]
    per_parameter = OPTIMIZER_BYTES.get(settings.optim)
    if per_parameter is not None:
        return per_parameter * sum(p.numel() for p in trained)
    kinds = Counter((p.shape, p.dtype) for p in trained)
    first = {(p.shape, p.dtype): p for p in reversed(trained)}
    for parameter in trained:
        if parameter is not first[parameter.shape, parameter.dtype]:
            parameter.grad = None
    optimizer = build_optimizer(model, settings)
    optimizer.step()
    return sum(
        count * _bytes(value for value in optimizer.state[first[kind]].values() if isinstance(value, Tensor))
        for kind, count in kinds.items()
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors, each storage once."""
    return sum({_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
