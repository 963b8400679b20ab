"""PEFT's tables from a method or a task to its classes, made of the registry."""

from __future__ import annotations

from peftcli.adapters.config import PeftConfig
from peftcli.adapters.mixed import COMPATIBLE, MixedModel
from peftcli.adapters.model import PeftModel
from peftcli.adapters.registry import METHODS, config_class
from peftcli.adapters.task_models import MODEL_CLASSES
from peftcli.adapters.tuner import Tuner, tuner_class

PEFT_TYPE_TO_CONFIG_MAPPING: dict[str, type[PeftConfig]] = {name: config_class(name) for name in METHODS}
PEFT_TYPE_TO_TUNER_MAPPING: dict[str, type[Tuner]] = {
    name: tuner_class(name) for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if not config.is_prompt_learning
}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[str, type[Tuner]] = dict.fromkeys(sorted(COMPATIBLE), MixedModel)
PEFT_TYPE_TO_PREFIX_MAPPING = {name: config.prefix for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    task.value: model for task, model in MODEL_CLASSES.items() if task is not None
}
