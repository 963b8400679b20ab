"""`PromptEncoder` keeps a prompt's tensors under PEFT's names; `attach_prompt` gives a model one.

Nothing in the model is replaced but the heads its task trains: the prompt enters through the inputs (`prompt_inputs.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters import kv_cache
from peftcli.adapters.attach import Placement, attach_copy, check_new
from peftcli.adapters.config import TaskType
from peftcli.adapters.engine import STATE, Attached, attached_to
from peftcli.adapters.planning import plan_copies
from peftcli.adapters.prompt_base import PromptLearningConfig, PromptMethod
from peftcli.adapters.prompt_inputs import (
    DECODER,
    TEXT,
    CacheHook,
    EmbeddingsHook,
    EncoderDecoderHook,
    EncoderHook,
    Hook,
    require_cache,
)
from peftcli.adapters.registry import prompt_class
from peftcli.errors import InputError


class PromptEncoder(nn.Module):
    """One adapter's prompt. Kept in fp32 whatever the base's precision, and cast where it is used.

    Args:
        method: states the parts and the prompt they make.
        device: where the tensors are made; on `meta` they stay empty.
    """

    def __init__(self, method: PromptMethod, device: torch.device) -> None:
        super().__init__()
        self.method = method
        with device:
            for name, part in method.parts().items():
                if isinstance(part, (nn.Module, nn.Parameter)):
                    setattr(self, name, part)
                else:
                    self.register_buffer(name, part)
        self.to(torch.float32)

    @property
    def tokens(self) -> int:
        """How many tokens stand in front of each sequence."""
        return self.method.config.num_virtual_tokens

    @property
    def reaches_decoder(self) -> bool:
        """Whether an encoder-decoder's decoder gets a prompt of its own, besides the encoder's."""
        return self.method.in_decoder and self.method.config.num_transformer_submodules == 2

    def forward(self, task_ids: Tensor | None = None) -> Tensor:
        """The prompt [tokens, width], or [B, tokens, width] for tasks [B]."""
        return self.method.prompt(self, task_ids)

    def live(self) -> dict[str, Tensor]:
        """The tensors a file's keys stand for; none where the file holds less than the encoder."""
        return self.method.live(self) if self.method.is_plain else {}

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """What the file holds, by key."""
        return self.method.stored(self)

    def check_loadable(self, tensors: Mapping[str, Tensor], place: str | Path) -> None:
        """Refuse a file of another length, and any where this encoder can't be told from the prompt it gives."""
        config = self.method.config
        if not self.method.is_plain:
            raise InputError(
                f"a {config.peft_type} file holds the prompt, not the network that made it: it can't go on training",
                place=place,
                fix="load it with PeftModel.from_pretrained",
            )
        rows = len(tensors["prompt_embeddings"]) if "prompt_embeddings" in tensors else self.method.tokens
        if rows != self.method.tokens:
            raise InputError(
                f"is {config.num_virtual_tokens}, but the file's prompt has {rows} rows, not {self.method.tokens}",
                place=place,
                field="num_virtual_tokens",
            )


def prompt_of_batch(encoder: Any, rows: int, task_ids: Tensor | None = None) -> Any:
    """A prompt as `rows` sequences get it: embeddings [rows, tokens, width], or a `DynamicCache` with keys and values."""
    prompt: Tensor = encoder(task_ids)
    if encoder.method.feeds == "embeddings":
        return prompt if prompt.dim() == 3 else prompt.expand(rows, *prompt.shape)
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, pair in enumerate(encoder.method.key_values(prompt)):
        cache.update(*(states.expand(rows, *states.shape) for states in pair), layer)
    return cache


def attach_prompt(model: nn.Module, config: PromptLearningConfig, name: str, *, initialize: bool = True) -> Attached:
    """Give a model a new prompt, and trained copies of the heads its task needs.

    Args:
        model: a transformers model; it is frozen but for the prompt.
        config: what it leaves open is taken from the model.
        name: the adapter's name.
        initialize: False leaves the prompt at random, for one that is loaded next.

    Raises:
        InputError: if the config does not fit the model; the model is then left as it was.
    """
    config.check()
    attached = attached_to(model) or Attached(model)
    check_new(attached, config, name)
    words = _word_embeddings(model, config)
    method = prompt_class(config)(config)
    hooks = _hooks(attached, method)  # refuses a model the prompt can't get into
    copies = plan_copies(model, config, [])
    encoder = PromptEncoder(method, words.weight.device)
    if initialize and not words.weight.is_meta:
        with torch.no_grad():
            method.initialize(encoder, words)
    first = not attached.configs
    if first:
        model.requires_grad_(False)
        model.__dict__[STATE] = attached
        for module, hook in hooks:
            attached.hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            if isinstance(hook, CacheHook):
                attached.hooks.append(module.register_forward_hook(hook.after, with_kwargs=True))
    attached.configs[name] = config
    attached.prompts[name] = encoder
    for path, names in copies.items():
        attach_copy(attached, name, path, names, Placement())
    if first:
        attached.set_active([name], trainable=not config.inference_mode)
    else:
        attached.set_requires_grad(name, False)  # it stands by
    return attached


def _word_embeddings(model: Any, config: PromptLearningConfig) -> nn.Embedding:
    """The model's input embeddings; what the config leaves open is filled in."""
    if config.task is None:
        raise InputError(
            f"is {config.task_type!r}: a prompt must know the task", field="task_type", allowed=", ".join(TaskType)
        )
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
        raise InputError(f"{config.peft_type} needs a transformers model, not {type(model).__name__}")
    words = model.get_input_embeddings()
    width = words.weight.shape[1]
    in_front_of_words = prompt_class(config).feeds == "embeddings"
    if in_front_of_words and config.token_dim is None:
        config.token_dim = width
    config.complete(model.config)
    if in_front_of_words and config.token_dim != width:
        raise InputError(
            f"is {config.token_dim}, but the model's embeddings have {width}", field="token_dim", allowed=str(width)
        )
    return words


def _hooks(attached: Attached, method: PromptMethod) -> list[tuple[nn.Module, Hook]]:
    """The hooks a method needs, each with the module whose inputs it changes."""
    model: Any = attached.root
    encoder_decoder = method.config.task == TaskType.SEQ_2_SEQ_LM
    if method.feeds == "cache":
        module = _part_with_cache(model)
        require_cache(module, method.config.peft_type)
        return [(module, CacheHook(attached, DECODER if encoder_decoder else TEXT))]
    if encoder_decoder:
        return [(model.get_encoder(), EncoderHook(attached)), (model, EncoderDecoderHook(attached))]
    return [(model, EmbeddingsHook(attached))]


def _part_with_cache(model: Any) -> nn.Module:
    """The model, or what its head stands on, whichever takes a cache."""
    for module in (model, getattr(model, "base_model", model)):
        if kv_cache.argument_of(module):
            return module
    raise InputError("Model does not support past key values which are required for prefix tuning.")
