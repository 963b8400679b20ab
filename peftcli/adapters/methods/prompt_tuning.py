"""Prompt tuning: learnt embeddings in front of the text's (Lester et al. 2021, arXiv 2104.08691).

The prompt is an embedding's rows. It starts at random, at the words of a text, or at random words: the last two start
near what the model knows and train far better.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftcli.adapters.prompt_base import PromptLearningConfig, PromptMethod
from peftcli.errors import InputError, printable
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import nn


class PromptTuningInit(str, Enum):
    """Where a prompt starts."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning's fields, as in PEFT.

    Attributes:
        prompt_tuning_init: see `PromptTuningInit`.
        prompt_tuning_init_text: the text to start at; repeated or cut to the prompt's length.
        tokenizer_name_or_path: the tokenizer of that text.
        tokenizer_kwargs: arguments of `AutoTokenizer.from_pretrained`.
    """

    peft_type = "PROMPT_TUNING"
    inits: ClassVar[type[Enum]] = PromptTuningInit

    prompt_tuning_init: Literal["TEXT", "SAMPLE_VOCAB", "RANDOM"] | PromptTuningInit = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prompt_tuning_init, Enum):
            self.prompt_tuning_init = self.prompt_tuning_init.value

    def validate(self) -> None:
        super().validate()
        known = [item.value for item in self.inits]
        if self.prompt_tuning_init not in known:
            raise InputError(
                f"{printable(repr(self.prompt_tuning_init), 80)} is no way to start a prompt",
                field="prompt_tuning_init",
                allowed=", ".join(known),
            )
        is_text = self.prompt_tuning_init == "TEXT"
        for field in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if is_text and not getattr(self, field):
                raise InputError(
                    f"When prompt_tuning_init='TEXT', {field} can't be {getattr(self, field)}.", field=field
                )
        if self.tokenizer_kwargs and not is_text:
            raise InputError(
                "tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.", field="tokenizer_kwargs"
            )


class PromptTuning(PromptMethod):
    """Embeddings in front of the text's."""

    def initialize(self, p: Any, words: nn.Embedding) -> None:
        if self.config.prompt_tuning_init == "TEXT":
            ids = torch.tensor(list(itertools.islice(itertools.cycle(self._text_ids()), self.tokens)))
        elif self.config.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(words.num_embeddings, (self.tokens,))
        else:
            return
        p.embedding.weight.copy_(words(ids.to(words.weight.device)))

    def _text_ids(self) -> list[int]:
        from transformers import AutoTokenizer

        config = self.config
        # A config may come from a stranger: it must not be able to ask for code to be run.
        options = {
            name: value for name, value in (config.tokenizer_kwargs or {}).items() if name != "trust_remote_code"
        }
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
        ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
        if not ids:
            raise InputError("holds no token", field="prompt_tuning_init_text")
        return ids
