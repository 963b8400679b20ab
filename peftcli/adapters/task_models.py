"""`PeftModel` under the names PEFT gives it for each task. What a task needs is done where it matters: heads, prompts."""

from __future__ import annotations

from peftcli.adapters.config import PeftConfig, TaskType
from peftcli.adapters.model import PeftModel


class PeftModelForCausalLM(PeftModel):
    """A language model with adapters."""


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder with adapters."""


class PeftModelForSequenceClassification(PeftModel):
    """A sequence classifier with adapters; its head is trained in full."""


class PeftModelForTokenClassification(PeftModel):
    """A token classifier with adapters; its head is trained in full."""


class PeftModelForQuestionAnswering(PeftModel):
    """An extractive reader with adapters; its head is trained in full."""


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
