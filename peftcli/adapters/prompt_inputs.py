"""Puts a prompt into a model's inputs: hooks that change what a module is called with, one place for each kind of input.

The model's own code runs as its author wrote it, in training, in evaluation and in `generate` alike, where a hook tells
the first pass over a text from the later ones by what the cache already holds.

| prompt of          | on                                 | hook             |
|--------------------|------------------------------------|------------------|
| embeddings         | a model with one sequence of inputs | `EmbeddingsHook` |
| embeddings         | an encoder-decoder                 | `EncoderHook` on its encoder, `EncoderDecoderHook` on all of it |
| keys and values    | the part of the model that has a cache | `CacheHook`   |
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters import kv_cache
from peftcli.adapters.config import TaskType
from peftcli.adapters.engine import Attached
from peftcli.errors import InputError

if TYPE_CHECKING:
    from peftcli.adapters.prompt import PromptEncoder

IGNORED = -100
"""The label that torch's cross-entropy leaves out."""

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """One sequence of a model's inputs, by the names of its arguments."""

    ids: str
    embeds: str
    mask: str
    positions: str


TEXT = Stream("input_ids", "inputs_embeds", "attention_mask", "position_ids")
DECODER = Stream("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "decoder_position_ids")


class Hook:
    """A forward pre-hook that changes the inputs as the active prompt wants, and nothing where there is none."""

    def __init__(self, attached: Attached) -> None:
        self.attached = attached

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Inputs) -> tuple[tuple[()], Inputs] | None:
        encoder = self.attached.prompt
        if encoder is None:
            return None
        inputs = dict(kwargs)
        if args:
            inputs |= dict(zip(inspect.signature(module.forward).parameters, args, strict=False))
        self.change(module, inputs, encoder)
        return (), inputs

    def change(self, module: nn.Module, inputs: Inputs, encoder: PromptEncoder) -> None:
        """Change the inputs in place."""
        raise NotImplementedError

    def rows(self, encoder: PromptEncoder, rows: int) -> Tensor:
        """The prompt of each row of the batch [rows, tokens, width]. Beam search repeats each task."""
        prompt = encoder(self.attached.context.task_ids)
        if prompt.dim() == 2:
            return prompt.expand(rows, -1, -1)
        if rows % len(prompt):
            raise InputError(f"{len(prompt)} tasks for {rows} rows", field="task_ids", allowed="one for each row")
        return prompt.repeat_interleave(rows // len(prompt), dim=0)

    def prepend(self, inputs: Inputs, stream: Stream, prompt: Tensor) -> None:
        """Put rows [B, tokens, width] in front of a stream's embeddings."""
        embeds = inputs.get(stream.embeds)
        if embeds is None:
            ids = inputs.get(stream.ids)
            if ids is None:
                raise InputError(f"a prompt needs `{stream.ids}` or `{stream.embeds}`", field=stream.ids)
            embeds = self.attached.root.get_input_embeddings()(ids)  # type: ignore[operator]
        inputs[stream.ids] = None
        inputs[stream.embeds] = torch.cat([prompt.to(embeds), embeds], dim=1)
        self._move_positions(inputs, stream, prompt.shape[1])

    def _move_positions(self, inputs: Inputs, stream: Stream, tokens: int) -> None:
        """Positions that `generate` made move on; a caller's own are dropped, as in PEFT."""
        positions = inputs.get(stream.positions)
        if positions is None:
            return
        if not self.attached.context.generating:
            warnings.warn(
                "Position ids are not supported for parameter efficient tuning. Ignoring position ids.", stacklevel=2
            )
            inputs[stream.positions] = None
            return
        own = torch.arange(tokens, device=positions.device).expand(*positions.shape[:-1], -1)
        inputs[stream.positions] = torch.cat([own, positions + tokens], dim=-1)


class EmbeddingsHook(Hook):
    """A prompt in front of the one sequence a model takes."""

    def change(self, module: nn.Module, inputs: Inputs, encoder: PromptEncoder) -> None:
        tokens, rows = encoder.tokens, _batch_size(inputs)
        extend_mask(inputs, TEXT, tokens, rows)
        if kv_cache.is_filled(kv_cache.given(inputs)):  # the prompt is in there
            shift(inputs, TEXT.positions, tokens)
            return
        self.prepend(inputs, TEXT, self.rows(encoder, rows))
        self._extend_others(inputs, tokens, rows)

    def _extend_others(self, inputs: Inputs, tokens: int, rows: int) -> None:
        """Labels and the like follow the text."""
        task = self.attached.configs[self.attached.active[0]].task
        if task in (TaskType.CAUSAL_LM, TaskType.TOKEN_CLS):
            pad_front(inputs, "labels", tokens, IGNORED)
        if task in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS):
            pad_front(inputs, "token_type_ids", tokens, 0)
        elif inputs.get("token_type_ids") is not None:
            warnings.warn(
                "Token type ids are not supported for parameter efficient tuning. Ignoring token type ids", stacklevel=2
            )
            inputs["token_type_ids"] = None
        for name in ("start_positions", "end_positions"):
            shift(inputs, name, tokens)
        if task == TaskType.SEQ_CLS and hasattr(self.attached.root, "score"):
            _require_left_padding(inputs)


class EncoderHook(Hook):
    """A prompt in front of what an encoder-decoder's encoder reads. `generate` calls the encoder by itself."""

    def change(self, module: nn.Module, inputs: Inputs, encoder: PromptEncoder) -> None:
        rows, tokens = _batch_size(inputs), encoder.tokens
        self.prepend(inputs, TEXT, self.rows(encoder, rows)[:, :tokens])
        extend_mask(inputs, TEXT, tokens, rows, unless=inputs[TEXT.embeds].shape[1])


class EncoderDecoderHook(Hook):
    """The mask of the encoder's outputs, and the decoder's own prompt where a method has one."""

    def change(self, module: nn.Module, inputs: Inputs, encoder: PromptEncoder) -> None:
        tokens, rows = encoder.tokens, _batch_size(inputs)
        extend_mask(inputs, TEXT, tokens, rows)
        if not encoder.reaches_decoder:
            return
        extend_mask(inputs, DECODER, tokens, rows)
        if kv_cache.is_filled(kv_cache.given(inputs)):
            shift(inputs, DECODER.positions, tokens)
            return
        if inputs.get(DECODER.ids) is None and inputs.get(DECODER.embeds) is None:
            inputs[DECODER.ids] = module.prepare_decoder_input_ids_from_labels(inputs["labels"])  # type: ignore[operator]
        self.prepend(inputs, DECODER, self.rows(encoder, rows)[:, tokens:])
        pad_front(inputs, "labels", tokens, IGNORED)


class CacheHook(Hook):
    """Keys and values in front of every layer's own: a cache that already holds them.

    A model returns the cache it was given. A caller who wants none (`use_cache=False`) gets none, or would go on with it.
    """

    def __init__(self, attached: Attached, stream: Stream) -> None:
        super().__init__(attached)
        self.stream = stream

    def change(self, module: nn.Module, inputs: Inputs, encoder: PromptEncoder) -> None:
        if module.training:
            require_cache(module, encoder.method.config.peft_type)
        rows = _batch_size(inputs)
        extend_mask(inputs, self.stream, encoder.tokens, rows)
        shift(inputs, self.stream.positions, encoder.tokens)
        cache: Any = kv_cache.given(inputs)
        if cache is None:
            cache = self._empty_cache(module)
            for name in kv_cache.NAMES:
                inputs.pop(name, None)
            inputs[str(kv_cache.argument_of(module))] = cache
        if not kv_cache.is_filled(cache):
            own = getattr(cache, "self_attention_cache", cache)
            prompt = encoder().to(_compute_dtype(module))
            for layer, pair in enumerate(encoder.method.key_values(prompt)):
                own.update(*(states.expand(rows, *states.shape) for states in pair), layer)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Inputs, output: Any) -> Any:
        """The output without the prompt's cache, where the caller has no use for one; a forward hook."""
        if kwargs.get("use_cache") is not False or not isinstance(output, Mapping):
            return output
        return type(output)(**kv_cache.without(output))

    def _empty_cache(self, module: Any) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        if self.stream is DECODER:
            return EncoderDecoderCache(DynamicCache(config=module.config), DynamicCache(config=module.config))
        return DynamicCache(config=module.config)


# -- details --------------------------------------------------------------------------------------------------------


def require_cache(module: nn.Module, method: str) -> None:
    """Refuse gradient checkpointing: transformers' layers then drop the cache, and the prompt with it."""
    if any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
        raise InputError(f"{method} does not work with gradient checkpointing.", field="gradient_checkpointing")


def extend_mask(inputs: Inputs, stream: Stream, tokens: int, rows: int, *, unless: int | None = None) -> None:
    """Let the text see the prompt; a mask that is already `unless` long does."""
    mask = inputs.get(stream.mask)
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise InputError(
            "a prompt needs a mask [batch, tokens]",
            field=stream.mask,
            fix="leave out custom masks and static caches (cache_implementation)",
        )
    if mask.shape[1] != unless:
        inputs[stream.mask] = torch.cat([mask.new_ones(rows, tokens), mask], dim=1)


def pad_front(inputs: Inputs, name: str, tokens: int, value: int) -> None:
    """`value` for each token of the prompt, in front of an input [B, T], where it is given."""
    given = inputs.get(name)
    if given is not None:
        inputs[name] = torch.cat([given.new_full((len(given), tokens), value), given], dim=1)


def shift(inputs: Inputs, name: str, tokens: int) -> None:
    """Positions in the text as positions behind the prompt, where they are given."""
    if inputs.get(name) is not None:
        inputs[name] = inputs[name] + tokens


def _require_left_padding(inputs: Inputs) -> None:
    """A decoder with a `score` head takes the last token's answer, found by its id, which it gets no more."""
    mask = inputs.get(TEXT.mask)
    if mask is not None and bool((mask[:, -1] == 0).any()):
        raise InputError(
            "the model classifies by its last token, and can't tell which one that is behind a prompt",
            field=TEXT.mask,
            fix="pad on the left (tokenizer.padding_side = 'left')",
        )


def _batch_size(inputs: Inputs) -> int:
    for name in (TEXT.ids, TEXT.embeds, DECODER.ids, DECODER.embeds, "labels"):
        if inputs.get(name) is not None:
            return len(inputs[name])
    if inputs.get("encoder_outputs") is not None:
        return len(inputs["encoder_outputs"][0])
    raise InputError("a prompt needs inputs to stand in front of", field=TEXT.ids)


def _compute_dtype(module: Any) -> torch.dtype:
    """The precision of a module's keys and values."""
    device = module.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else module.dtype
