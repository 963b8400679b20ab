"""peftcli: fine-tune models with adapters, from the command line or from Python.

The names PEFT's documentation teaches are offered here and imported when first used, so `import peftcli` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "PeftConfig": "config",
    "TaskType": "config",
    "PeftType": "registry",
    "AutoPeftModel": "auto",
    "AutoPeftModelForCausalLM": "auto",
    "AutoPeftModelForFeatureExtraction": "auto",
    "AutoPeftModelForQuestionAnswering": "auto",
    "AutoPeftModelForSeq2SeqLM": "auto",
    "AutoPeftModelForSequenceClassification": "auto",
    "AutoPeftModelForTokenClassification": "auto",
    "CordaConfig": "initializers.corda",
    "EvaConfig": "initializers.eva",
    "BdLoraConfig": "methods.lora_variants",
    "KasaConfig": "methods.lora_variants",
    "MontecloraConfig": "methods.lora_variants",
    "VeloraConfig": "methods.lora_variants",
    "LoftQConfig": "methods.lora",
    "LoraGAConfig": "initializers.lora_ga",
    "MultitaskPromptTuningInit": "methods.multitask_prompt_tuning",
    "PromptEncoderReparameterizationType": "methods.p_tuning",
    "PromptLearningConfig": "prompt_base",
    "PromptTuningInit": "methods.prompt_tuning",
    "initialize_lora_eva_weights": "initializers.eva",
    "replace_lora_weights_loftq": "initializers.loftq_replace",
    "preprocess_corda": "initializers.corda",
    "preprocess_loraga": "initializers.lora_ga",
    "PeftMixedModel": "mixed",
    "PeftModel": "model",
    "PeftModelForCausalLM": "task_models",
    "PeftModelForFeatureExtraction": "task_models",
    "PeftModelForQuestionAnswering": "task_models",
    "PeftModelForSeq2SeqLM": "task_models",
    "PeftModelForSequenceClassification": "task_models",
    "PeftModelForTokenClassification": "task_models",
    "get_peft_model": "functions",
    "get_peft_model_state_dict": "functions",
    "inject_adapter_in_model": "functions",
    "set_peft_model_state_dict": "functions",
    "get_layer_status": "status",
    "get_model_status": "status",
    "cast_mixed_precision_params": "helpers",
    "check_if_peft_model": "helpers",
    "get_peft_config": "helpers",
    "load_peft_weights": "helpers",
    "prepare_model_for_kbit_training": "helpers",
    "rescale_adapter_scale": "helpers",
    "shift_tokens_right": "helpers",
    "hotswap_adapter": "hotswap",
    "prepare_model_for_compiled_hotswap": "hotswap",
}
"""Public name -> the file in `peftcli/adapters` it lives in. Configs are found through the registry of methods."""

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"peftcli.adapters.{_HOME[name]}"), name)
    elif name.endswith("Config"):
        from peftcli.adapters.registry import METHODS

        files = [method.file for method in METHODS.values() if method.config == name]
        if not files:
            raise AttributeError(f"module 'peftcli' has no attribute {name!r}")
        value = getattr(import_module(f"peftcli.adapters.methods.{files[0]}"), name)
    else:
        raise AttributeError(f"module 'peftcli' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from peftcli.adapters.registry import METHODS

    return sorted({*__all__, *(method.config for method in METHODS.values())})
