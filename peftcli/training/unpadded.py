"""Batches without padding: the samples of a batch laid end to end in one row, each attending only to itself.

Positions restart with each sample. transformers' decoders look their attention up in a registry by name and hand
further arguments on to it, so a function registered there is all that is needed: it attends sample by sample, causally,
and no mask is ever built. FlashAttention does the same from the same arguments, where a model is loaded with it.

Whether a model plays along (positions from `position_ids`, nothing else that looks along the row) is proved on the
first batch: `Unpadded.prove` compares its outputs with those of the padded batch. A model that does not trains on
padded batches, as does one whose adapter must know which row a token is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253
from torch.nn.functional import scaled_dot_product_attention  # noqa: TID253

from peftcli.adapters.engine import attached_to, user_model
from peftcli.adapters.quantized import INT8
from peftcli.training.blocked_attention import BlockedAttention, is_quicker

NAME = "peftcli_segments"
"""The attention's name in transformers' registry."""

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers that look along the row through the registry; others (convolutions, recurrences) don't ask it."""

FLASH = "flash_attention_2"
PROOF_ROWS, PROOF_TOKENS = 3, 24
"""How much of the first batch the proof is made on."""

KEYS = {"input_ids", "attention_mask", "labels"}
"""What a batch holds that can be laid end to end."""

Batch = dict[str, Tensor]


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_lengths: Sequence[int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within segments: query [1, H, N, D], key and value [1, Hk, N, D] -> [1, N, H, D].

    Raises:
        RuntimeError: the model asks for something else. Never answered by attention that would be wrong.
    """
    asked = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if segment_lengths is None or attention_mask is not None or asked or not causal:
        raise RuntimeError(f"attention over batches without padding can't do this: {asked or 'no segments given'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = []
    for q, k, v in zip(*(x.split(list(segment_lengths), dim=2) for x in (query, key, value)), strict=True):
        if is_quicker(q, dropout):
            parts.append(BlockedAttention.apply(q, k, v, scale))
        else:
            grouped = q.shape[1] != k.shape[1]
            part = scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=grouped
            )
            parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1), None


def unpadded(batch: Batch) -> tuple[dict[str, Any], Tensor]:
    """A padded batch [B, T] as one row [1, N] of its real tokens: what the model is called with, and the labels."""
    real = batch["attention_mask"].bool()
    lengths = real.sum(1)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    sizes = lengths.tolist()
    inputs = {
        "input_ids": batch["input_ids"][real].unsqueeze(0),
        "position_ids": torch.arange(real.shape[1], device=real.device).expand_as(real)[real].unsqueeze(0),
        "segment_lengths": sizes,
        # FlashAttention's names for the same.
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(sizes),
        "max_length_k": max(sizes),
    }
    return inputs, batch["labels"][real].unsqueeze(0)


class Unpadded:
    """A model's attention switched to segments for as long as it trains.

    The switch lasts from the first batch to `release`: layers that are checkpointed run again in the backward pass.

    Args:
        model: a causal language model, adapted or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config = getattr(user_model(model), "config", None)
        self._before: list[tuple[Any, str]] = []

    def fits(self, batch: Batch) -> bool:
        """Whether a batch can be laid end to end: ids and masks only, padded on the right, within the window."""
        if batch.keys() != KEYS:
            return False
        longest = batch["input_ids"].shape[1]
        return all(longest <= window for window in _windows(self.config))

    def switch(self) -> None:
        """Let the model attend within segments."""
        if not self._before and self._implementation() != FLASH:
            _register()
            self._before = [(config, config._attn_implementation) for config in _configs(self.config)]
            for config, _ in self._before:
                config._attn_implementation = NAME

    def release(self) -> None:
        """Give the model its own attention back."""
        while self._before:
            config, name = self._before.pop()
            config._attn_implementation = name

    @contextmanager
    def switched(self) -> Iterator[None]:
        """Switched inside, and after it where a backward pass may follow."""
        self.switch()
        try:
            yield
        finally:
            if not torch.is_grad_enabled():
                self.release()

    def _implementation(self) -> str | None:
        return getattr(self.config, "_attn_implementation", None)

    def conceivable(self) -> bool:
        """Whether nothing that is known of the model and its adapters speaks against it; `prove` tries."""
        kinds = set(getattr(_text(self.config), "layer_types", None) or ())
        if self._implementation() not in ("sdpa", "eager", FLASH) or kinds - ATTENTION:
            return False
        return not _needs_rows(self.model) and not _rounds_by_batch(self.model)

    @torch.no_grad()
    def prove(self, batch: Batch, hidden_states: Callable[[dict[str, Any]], Tensor]) -> bool:
        """Whether the model gives the same for some samples laid end to end as for the padded ones.

        Args:
            batch: a batch; a few tokens of a few rows are used.
            hidden_states: runs the model and gives what its head sees, [B, T, D].
        """
        if not self.conceivable() or batch.keys() != KEYS:
            return False
        few = _few(batch)
        # Judged by the few tokens: processes that share a base must run the model equally often, whatever their batches.
        if not self.fits(few):
            return False
        real = few["attention_mask"].bool()
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()  # dropout would draw other numbers
        try:
            with torch.random.fork_rng([real.device] if real.device.type == "cuda" else []):
                padded = hidden_states({name: few[name] for name in ("input_ids", "attention_mask")})[real]
                with self.switched():
                    laid_out = hidden_states(unpadded(few)[0])[0]
        except Exception:  # a model may refuse such a batch in any way: then it gets padded ones
            return False
        finally:
            for module, mode in modes:  # parents come before what is in them
                module.train(mode)
        return _close(laid_out, padded)


def _few(batch: Batch) -> Batch:
    """Some rows of a batch, cut to different lengths, so that a model that counts along the row gives itself away."""
    rows = min(PROOF_ROWS, len(batch["input_ids"]))
    few = {name: tensor[:rows, :PROOF_TOKENS].clone() for name, tensor in batch.items()}
    for row in range(rows):
        few["attention_mask"][row, max(1, few["attention_mask"].shape[1] - 3 * row) :] = 0
    if rows == 1:  # twice the same sample: the second must not see the first
        few = {name: tensor.expand(2, -1).clone() for name, tensor in few.items()}
    return few


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Within rounding; samples that see each other are off by far more."""
    tolerance = 1e-4 if ours.dtype in (torch.float32, torch.float64) else 2e-2
    return ours.shape == theirs.shape and bool((ours - theirs).float().norm() <= tolerance * theirs.float().norm())


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, segment_attention)


def _configs(config: Any) -> list[Any]:
    """A model's config and those inside it; attention layers read the one they were given."""
    names = getattr(config, "sub_configs", None) or {}
    return [config, *(sub for name in names if (sub := getattr(config, name, None)) is not None)]


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _windows(config: Any) -> Iterator[int]:
    """Limits to how far back a model attends, where it has any."""
    text = _text(config)
    for name in ("sliding_window", "attention_chunk_size", "attention_window_size"):
        value = getattr(text, name, None)
        if isinstance(value, int) and getattr(text, f"use_{name}", True):
            yield value


def _rounds_by_batch(model: nn.Module) -> bool:
    """Whether what a token gives depends on the others of its batch, so that a proof would hold for some batches only.

    LLM.int8 keeps those columns in 16 bits in which any token is large.
    """
    return any(type(module).__name__ == INT8 for module in model.modules())


def _needs_rows(model: nn.Module) -> bool:
    """Whether something attached to the model must see which row of the batch a token is in."""
    attached = attached_to(user_model(model))
    if attached is None:
        return False
    adapters = (adapter for _, layer in attached.layers() for adapter in layer.adapters.values())
    return bool(len(attached.prompts) or attached.gates) or any(a.needs_rows or a.rows_interact for a in adapters)
