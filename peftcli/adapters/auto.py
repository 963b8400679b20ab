"""`AutoPeftModel...`: base and adapter in one call, the base being the one the adapter's config names."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from peftcli.adapters import checkpoint
from peftcli.adapters.config import AUTO_CLASSES, PeftConfig, TaskType, read_config
from peftcli.adapters.model import PeftModel
from peftcli.adapters.task_models import MODEL_CLASSES, model_class
from peftcli.errors import InputError, printable


class AutoPeftModel:
    """Loads an adapter with its base, for any task. Only `from_pretrained` makes one."""

    task: ClassVar[TaskType | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(f"{name} is made by `{name}.from_pretrained(pretrained_model_name_or_path)`.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] = (),
        allow_pickle: bool = False,
        **base_options: Any,
    ) -> PeftModel:
        """Load the base an adapter belongs to, and the adapter on it.

        A tokenizer beside the adapter tells how many tokens the base must have: the embeddings grow where tokens were
        added. A base without a task type is loaded with the class that the config's `auto_mapping` names: one of
        transformers, or of the packages in `import_allowlist`. Nothing else is imported on a file's word.

        Raises:
            InputError: if the adapter is for another task, or does not say which class loads its base.
        """
        hub = {key: base_options[key] for key in ("token", "cache_dir", "subfolder") if key in base_options}
        folder = checkpoint.resolve_adapter_folder(pretrained_model_name_or_path, revision=revision, **hub)
        base_options.pop("subfolder", None)
        config = config or read_config(folder / checkpoint.CONFIG_NAME)
        if cls.task is not None and config.task_type not in (None, cls.task):
            raise InputError(
                f"Expected target PEFT class: {model_class(config).__name__}, but you have asked for: "
                f"{MODEL_CLASSES[cls.task].__name__} make sure that you are loading the correct model for your task type."
            )
        if not config.base_model_name_or_path:
            raise InputError("the config names no base model", place=folder, field="base_model_name_or_path")
        loader = _base_class(config, cls.task, import_allowlist, folder)
        base = loader.from_pretrained(config.base_model_name_or_path, revision=config.revision, **base_options)
        if (folder / "tokenizer_config.json").exists():
            from transformers import AutoTokenizer

            tokens = len(AutoTokenizer.from_pretrained(folder))
            if tokens > base.get_input_embeddings().num_embeddings:
                base.resize_token_embeddings(tokens)
        kind = MODEL_CLASSES[cls.task] if cls.task else PeftModel
        return kind.from_pretrained(
            base, folder, adapter_name, is_trainable=is_trainable, config=config, allow_pickle=allow_pickle
        )


def _base_class(config: PeftConfig, task: TaskType | None, allowlist: Sequence[str], folder: Path) -> Any:
    """The class that loads the base: the one of the task, else the one `auto_mapping` names."""
    import transformers

    if config.task_type in AUTO_CLASSES:
        return getattr(transformers, AUTO_CLASSES[TaskType(config.task_type)])
    mapping = config.auto_mapping or {}
    name, library = mapping.get("base_model_class"), str(mapping.get("parent_library"))
    trusted = any(f"{library}.".startswith(f"{package}.") for package in allowlist)
    found = getattr(import_module(library) if trusted else transformers, name, None) if isinstance(name, str) else None
    if hasattr(found, "from_pretrained") and (trusted or _is_model(found)):
        return found
    if task is not None:
        return getattr(transformers, AUTO_CLASSES[task])
    raise InputError(
        "Cannot infer the auto class from the config, please make sure that you are loading the correct model for "
        f"your task type (auto_mapping names {printable(name)!r})",
        place=folder,
        field="task_type",
        fix=f"import_allowlist=[{printable(library)!r}], if that package is yours" if mapping and not trusted else None,
    )


def _is_model(found: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(found, type) and issubclass(found, PreTrainedModel)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """An adapter of a language model with its base."""

    task = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """An adapter of an encoder-decoder with its base."""

    task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """An adapter of a sequence classifier with its base."""

    task = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """An adapter of a token classifier with its base."""

    task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """An adapter of an extractive reader with its base."""

    task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """An adapter of an encoder with its base."""

    task = TaskType.FEATURE_EXTRACTION
