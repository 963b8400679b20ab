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
    "BaseTunerLayer": "layer",
    "CPTEmbedding": "prompt_modules",
    "CartridgeEncoder": "prompt_modules",
    "PrefixEncoder": "prompt_modules",
    "PromptEmbedding": "prompt_modules",
    "PromptEncoder": "prompt_modules",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": "mappings",
    "PEFT_TYPE_TO_CONFIG_MAPPING": "mappings",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": "mappings",
    "PEFT_TYPE_TO_TUNER_MAPPING": "mappings",
    "LoftQConfig": "methods.lora",
    "compose_cartridge_adapters": "kv_prefix",
    "initialize_kv_prefix_from_past_key_values": "kv_prefix",
    "initialize_kv_prefix_from_text": "kv_prefix",
    "prompt_embeddings_from_past_key_values": "kv_prefix",
    "LoraRuntimeConfig": "methods.lora_config",
    "LoraGAConfig": "initializers.lora_ga",
    "MultitaskPromptTuningInit": "methods.multitask_prompt_tuning",
    "PromptEncoderReparameterizationType": "methods.p_tuning",
    "PromptLearningConfig": "prompt_base",
    "PromptTuningInit": "methods.prompt_tuning",
    "get_eva_state_dict": "initializers.eva",
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
    "get_peft_model_state_dict": "state",
    "cast_adapter_dtype": "functions",
    "delete_adapter": "functions",
    "inject_adapter_in_model": "functions",
    "set_adapter": "functions",
    "set_requires_grad": "functions",
    "get_base_model_state_dict": "state",
    "set_base_model_state_dict": "state",
    "set_peft_model_state_dict": "state",
    "get_layer_status": "status",
    "get_model_status": "status",
    "cast_mixed_precision_params": "helpers",
    "check_if_peft_model": "helpers",
    "get_peft_config": "helpers",
    "load_peft_weights": "helpers",
    "prepare_model_for_kbit_training": "helpers",
    "rescale_adapter_scale": "helpers",
    "shift_tokens_right": "helpers",
    "convert_to_lora": "conversion",
    "save_as_lora": "conversion",
    "hotswap_adapter": "hotswap",
    "hotswap_adapter_from_state_dict": "hotswap",
    "prepare_model_for_compiled_hotswap": "hotswap",
}
"""Public name -> the file in `peftcli/adapters` it lives in. Configs and tuners are found through the registry of methods."""

_ERRORS = {"NoMatchingPeftModuleError", "PeftError", "PeftWarning"}

_INSTEAD = {
    "ArrowConfig": "Arrow routing is not here; XLoraConfig weighs several LoRAs",
    "create_arrow_model": "Arrow routing is not here; XLoraConfig weighs several LoRAs",
    "ShadowConfig": "Shadow is not here; prompt_tuning and prefix_tuning leave the base's layers alone, too",
    "ShadowModel": "Shadow is not here; prompt_tuning and prefix_tuning leave the base's layers alone, too",
    "find_kappa_target_modules": "KappaTune's choice of modules is not here; name target_modules, or `all-linear`",
    "bloom_model_postprocess_past_key_value": "prefixes reach every model through transformers' caches, also BLOOM",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": "prefixes reach every model through its cache alike",
}
"""PEFT's names that are not here, and what to use."""

__all__ = ["__version__", *_HOME, *sorted(_ERRORS)]


def __getattr__(name: str) -> Any:
    if name in _ERRORS:
        value = getattr(import_module("peftcli.errors"), name)
    elif name in _HOME:
        value = getattr(import_module(f"peftcli.adapters.{_HOME[name]}"), name)
    elif name in _peft_paths():
        value = import_module(f"peftcli.{name}")
    else:
        from peftcli.adapters.registry import config_named, tuner_type

        value = config_named(name)
        if value is None and (peft_type := tuner_type(name)) is not None:
            from peftcli.adapters.tuner import tuner_class

            value = tuner_class(peft_type)
        if value is None and name in _INSTEAD:  # `from peftcli import` would swallow an AttributeError's text
            raise ImportError(f"peftcli has no {name}: {_INSTEAD[name]}")
        if value is None:
            raise AttributeError(f"module 'peftcli' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from peftcli.adapters.registry import METHODS, tuner_type

    tuners = [method.tuner for method in METHODS.values() if tuner_type(method.tuner)]
    return sorted({*__all__, *(method.config for method in METHODS.values()), *tuners})


def _peft_paths() -> frozenset[str]:
    from peftcli.peft_paths import paths

    return paths()


def _install_peft_paths() -> None:
    from peftcli.peft_paths import install

    install()


_install_peft_paths()
