"""`PeftModel` under the names PEFT gives it for each task. What a task needs is done where it matters: heads, prompts.

Each class says what its `forward` takes, since `transformers.Trainer` drops every other column of a data set.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from peftcli.adapters.config import PeftConfig, TaskType
from peftcli.adapters.model import PeftModel

INPUTS = ("input_ids", "attention_mask", "inputs_embeds")
DECODER_INPUTS = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")


def _takes(*names: str) -> Callable[[type[PeftModel]], type[PeftModel]]:
    """A class whose `forward` has a signature with these names; what it does is unchanged."""

    def decorate(cls: type[PeftModel]) -> type[PeftModel]:
        @wraps(PeftModel.forward)
        def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
            return PeftModel.forward(self, *args, **kwargs)

        keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
        told = [inspect.Parameter(name, keyword, default=None) for name in names]
        rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
        own = inspect.Parameter("self", keyword)
        forward.__signature__ = inspect.Signature([own, *told, rest])  # type: ignore[attr-defined]
        cls.forward = forward  # type: ignore[method-assign]
        return cls

    return decorate


@_takes(*INPUTS, "labels", "task_ids")
class PeftModelForCausalLM(PeftModel):
    """A language model with adapters."""


@_takes(*INPUTS, *DECODER_INPUTS, "labels", "task_ids")
class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder with adapters."""


@_takes(*INPUTS, "token_type_ids", "labels", "task_ids")
class PeftModelForSequenceClassification(PeftModel):
    """A sequence classifier with adapters; its head is trained in full."""


@_takes(*INPUTS, "token_type_ids", "labels", "task_ids")
class PeftModelForTokenClassification(PeftModel):
    """A token classifier with adapters; its head is trained in full."""


@_takes(*INPUTS, "token_type_ids", "start_positions", "end_positions", "task_ids")
class PeftModelForQuestionAnswering(PeftModel):
    """An extractive reader with adapters; its head is trained in full."""


@_takes(*INPUTS, "token_type_ids", "task_ids")
class PeftModelForFeatureExtraction(PeftModel):
    """An encoder with adapters."""


MODEL_CLASSES: dict[TaskType | None, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def model_class(config: PeftConfig) -> type[PeftModel]:
    """The PeftModel class of a task."""
    return MODEL_CLASSES.get(config.task, PeftModel)
