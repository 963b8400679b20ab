"""Greedy generation in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from peftcli.evaluation.metrics import Written
from peftcli.lazy import numpy as np
from peftcli.lazy import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

StepProgress = Callable[[int, int], None]
"""Called with how much is done, and out of how much."""


def generate(
    model: Any,
    prompts: Sequence[NDArray[np.int32]],
    *,
    end_tokens: list[int],
    pad_token_id: int,
    max_new_tokens: int,
    batch_size: int,
    adapters: Sequence[str] | None = None,
    tasks: Sequence[int] | None = None,
    progress: StepProgress | None = None,
) -> list[list[Written]]:
    """What a model writes after each prompt, always taking the likeliest token.

    Prompts are batched by length, so little is padded: on the left, as a decoder needs it, and on the right for an encoder.

    Args:
        model: has transformers' `generate`; in eval mode.
        prompts: each [P] int32.
        end_tokens: generation of a row ends with any of them.
        pad_token_id: fills up; told from a prompt's own tokens by position.
        max_new_tokens: a row ends there at the latest.
        batch_size: rows at a time, all adapters together; never less than one prompt.
        adapters: names in the model, each of which answers every prompt, all in one batch; None: the model as it stands.
        tasks: the task of each prompt, for adapters that learn several.
        progress: told how many prompts are done, and of how many.

    Returns:
        by adapter (one, if there are none), what is written after each prompt in the order given.
    """
    columns = len(adapters or [""])
    encodes = bool(getattr(model.config, "is_encoder_decoder", False))
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    written: list[list[Written]] = [[Written([], False)] * len(prompts) for _ in range(columns)]
    size = max(1, batch_size // columns)
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        batch = _pad([prompts[index] for index in indices for _ in range(columns)], pad_token_id, left=not encodes)
        if tasks is not None:
            batch["task_ids"] = np.repeat([tasks[index] for index in indices], columns)
        more = {} if adapters is None else {"adapter_names": [*adapters] * len(indices)}
        width = 1 if encodes else batch["input_ids"].shape[1]  # a decoder begins with a token of its own
        with torch.no_grad():
            outputs = model.generate(
                **{name: torch.from_numpy(column).to(model.device) for name, column in batch.items()},
                **more,
                generation_config=_greedy(model, end_tokens, pad_token_id, max_new_tokens),
            )
        for row, tokens in enumerate(outputs[:, width:].tolist()):
            written[row % columns][indices[row // columns]] = _until(tokens, end_tokens)
        if progress is not None:
            progress(start + len(indices), len(order))
    return written


def _greedy(model: Any, end_tokens: list[int], pad_token_id: int, max_new_tokens: int) -> Any:
    """Greedy, also where the base's own generation_config.json asks for sampling, beams or penalties."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_tokens,
        pad_token_id=pad_token_id,
        decoder_start_token_id=getattr(model.generation_config, "decoder_start_token_id", None),
    )


def _pad(prompts: Sequence[NDArray[np.int32]], pad_token_id: int, *, left: bool) -> dict[str, NDArray[np.int64]]:
    shape = (len(prompts), max(map(len, prompts)))
    input_ids, attention_mask = np.full(shape, pad_token_id, np.int64), np.zeros(shape, np.int64)
    for row, prompt in enumerate(prompts):
        place = slice(shape[1] - len(prompt), None) if left else slice(len(prompt))
        input_ids[row, place] = prompt
        attention_mask[row, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _until(tokens: list[int], end_tokens: list[int]) -> Written:
    """The tokens before the first end token."""
    end = next((index for index, token in enumerate(tokens) if token in end_tokens), None)
    return Written(tokens, False) if end is None else Written(tokens[:end], True)
