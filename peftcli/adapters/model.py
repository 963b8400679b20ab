"""`PeftModel` and `get_peft_model`: the public face of the engine, with PEFT's names and words.

A PeftModel holds a `Tuner` (`base_model`), which holds the user's model (`base_model.model`): that is where the parts of
every checkpoint key come from. With a prompt, `base_model` is the user's model itself and `prompt_encoder` stands beside.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters import checkpoint
from peftcli.adapters.attach import attach
from peftcli.adapters.config import PeftConfig, TaskType, read_config
from peftcli.adapters.context import check_adapter_names
from peftcli.adapters.engine import Attached, adapters_of, attached_to
from peftcli.adapters.prompt import attach_prompt
from peftcli.adapters.prompt_base import PromptLearningConfig
from peftcli.adapters.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from peftcli.adapters.tuner import Tuner
from peftcli.errors import InputError


class PeftModel(nn.Module):
    """A model with adapters.

    Args:
        model: the base; changed in place.
        peft_config: config of the first adapter.
        adapter_name: its name.
        autocast_adapter_dtype: keep adapters of half-precision models in fp32.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.base_model = model if peft_config.is_prompt_learning else Tuner(model)
        self.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype, **options)
        if peft_config.is_prompt_learning:
            self.prompt_encoder = self.attached.prompts
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            cast(Any, model).enable_input_require_grads()  # else the first checkpointed block sees nothing to train

    # -- adapters -------------------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        initialize: bool = True,
    ) -> None:
        """Attach another adapter of the same method. The active adapter stays the active one."""
        self._check_same_method(peft_config)
        peft_config.add_heads()
        if isinstance(peft_config, PromptLearningConfig):
            attach_prompt(self.get_base_model(), peft_config, adapter_name, initialize=initialize)
        else:
            cast(Tuner, self.base_model).attach(
                peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, initialize=initialize
            )

    def _check_same_method(self, peft_config: PeftConfig) -> None:
        others = {config.peft_type for config in self.peft_config.values()}
        if others and peft_config.peft_type not in others:
            raise InputError(
                f"Cannot combine adapters with different peft types. Found {', '.join(others)} and "
                f"{peft_config.peft_type}."
            )

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> None:
        """Load a saved adapter beside the others. The model goes to eval mode unless the adapter is to be trained."""
        folder = checkpoint.resolve_adapter_folder(model_id, **hub)
        config = _for_loading(read_config(folder / checkpoint.CONFIG_NAME), is_trainable)
        tensors = checkpoint.read_tensors(folder, allow_pickle=allow_pickle)
        self.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype, initialize=False)
        try:
            checkpoint.load_state(self.attached, adapter_name, tensors, place=folder)
        except InputError:
            self.delete_adapter(adapter_name)
            raise
        if not is_trainable:
            self.eval()

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one; its tensors get gradients, unless `inference_mode`."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.attached.set_active(names, trainable=not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter without a trace."""
        if isinstance(self.base_model, Tuner):
            self.base_model.delete_adapter(adapter_name)
        else:
            self.attached.delete(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The bare base model inside the `with`. May be nested."""
        with self.attached.switched_off():
            yield

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        attached = attached_to(self.get_base_model())
        return attached.configs if attached else {}

    @property
    def attached(self) -> Attached:
        """The engine's view of the adapters."""
        return adapters_of(self)

    @property
    def active_adapters(self) -> list[str]:
        return self.attached.active

    @property
    def active_adapter(self) -> str:
        return self.active_adapters[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> str:
        return self.active_peft_config.peft_type

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """What adapters each adapted layer has, and their state."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The same of all layers together."""
        return get_model_status(self)

    def get_base_model(self) -> nn.Module:
        """The user's model (with the adapters still in it)."""
        return self.base_model.model if isinstance(self.base_model, Tuner) else self.base_model

    # -- running --------------------------------------------------------------------------------------------------

    def forward(
        self, *args: Any, adapter_names: list[str] | None = None, task_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The model's forward pass.

        Args:
            adapter_names: the adapter of each row (`__base__` for none), for mixed batches in eval mode.
            task_ids: the task of each row [B], for methods that learn several.
        """
        self.attached.context.task_ids = task_ids  # stays: checkpointing recomputes layers in the backward pass
        with self._mixed(adapter_names, _rows(args, kwargs)):
            return self.base_model(*args, **kwargs)

    def generate(
        self, *args: Any, adapter_names: list[str] | None = None, task_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The model's `generate`, also with an adapter or a task for each row. Beam search repeats them."""
        context = self.attached.context
        context.task_ids, context.generating = task_ids, True
        try:
            with self._mixed(adapter_names, _rows(args, kwargs)):
                return cast(Any, self.get_base_model()).generate(*args, **kwargs)
        finally:
            context.generating = False

    @contextmanager
    def _mixed(self, adapter_names: list[str] | None, rows: int | None) -> Iterator[None]:
        attached = self.attached
        if adapter_names is None:
            yield
            return
        if len(attached.prompts):
            raise InputError("`adapter_names` can't be used with prompts: the whole batch gets the active one")
        check_adapter_names(adapter_names, list(attached.configs), rows)
        if self.training:
            raise InputError("Cannot pass `adapter_names` when the model is in training mode.")
        if attached.merged:
            raise InputError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter`."
            )
        if attached.biases:
            raise InputError("Cannot pass `adapter_names` when an adapter trains biases of the base model.")
        attached.context.adapter_names = list(adapter_names)
        try:
            yield
        finally:
            attached.context.adapter_names = None

    # -- parameters -----------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters; packed 4-bit weights count as what they stand for, sharded ones whole."""
        trainable = total = 0
        for parameter in self.parameters():
            count = getattr(parameter, "ds_numel", None) or parameter.numel()
            if type(parameter).__name__ == "Params4bit":
                count = parameter.numel() * 2 * parameter.element_size()
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # -- saving and loading ---------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write adapters as PEFT does: `default` into the folder itself, others into a sub-folder of their name."""
        if not safe_serialization:
            raise InputError("adapters are written as safetensors only", field="safe_serialization", allowed="True")
        if Path(save_directory).is_file():
            raise InputError(f"Provided path ({save_directory}) should be a directory, not a file")
        names = selected_adapters or list(self.peft_config)
        if unknown := sorted(set(names) - set(self.peft_config)):
            raise InputError(
                f"You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                f"{list(self.peft_config)} - got {unknown}."
            )
        for name in names if is_main_process else []:
            folder = Path(save_directory) / ("" if name == "default" else name)
            checkpoint.save_adapter(self.attached, name, folder, save_embedding_layers=save_embedding_layers)

    @classmethod
    def class_for(cls, config: PeftConfig) -> type[PeftModel]:
        """The class a config's task asks for."""
        return model_class(config)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> PeftModel:
        """A model with a saved adapter, frozen and in eval mode unless `is_trainable`.

        Raises:
            InputErrors: listing every tensor the file lacks, has too much, or has in another shape.
        """
        folder = checkpoint.resolve_adapter_folder(model_id, **hub)
        config = _for_loading(config or read_config(folder / checkpoint.CONFIG_NAME), is_trainable)
        tensors = checkpoint.read_tensors(folder, allow_pickle=allow_pickle)
        wrapper = cls.class_for(config)(
            model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, initialize=False
        )
        try:
            checkpoint.load_state(wrapper.attached, adapter_name, tensors, place=folder)
        except InputError:
            wrapper.attached.unload(merge=False)  # the caller's model comes back as it was
            raise
        return wrapper if is_trainable else wrapper.eval()

    def __getattr__(self, name: str) -> Any:
        """Everything else is the tuner's, or the user's model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


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


def _for_loading(config: PeftConfig, is_trainable: bool) -> PeftConfig:
    """A saved adapter's config, set to how it is to be used."""
    if config.is_prompt_learning and is_trainable:
        raise InputError("Cannot set a prompt learning adapter to trainable when loading pretrained adapter.")
    config.inference_mode = not is_trainable
    return config


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A model with a fresh adapter. The model is changed in place.

    Args:
        model: any module; a transformers model for `all-linear`, task types and default targets.
        peft_config: the adapter's config.
        adapter_name: the adapter's name.
        mixed: adapters of different methods together.
        autocast_adapter_dtype: keep adapters of half-precision models in fp32.
        revision: the base's revision, recorded in the config.

    Raises:
        InputError: if the config does not fit the model.
    """
    if attached_to(model) is not None or isinstance(model, PeftModel):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before.",
            stacklevel=2,
        )
    name = getattr(getattr(model, "config", None), "name_or_path", None) or getattr(model, "name_or_path", None)
    if name and peft_config.base_model_name_or_path not in (None, name):
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{peft_config.base_model_name_or_path}' to "
            f"'{name}'. Please ensure that the correct base model is loaded when loading this checkpoint.",
            stacklevel=2,
        )
    peft_config.base_model_name_or_path = name or peft_config.base_model_name_or_path
    if revision is not None:
        if peft_config.revision not in (None, revision):
            warnings.warn(f"peft config has already set base model revision to {peft_config.revision}", stacklevel=2)
        peft_config.revision = revision
    if mixed:
        from peftcli.adapters.mixed import PeftMixedModel

        kind: type[PeftModel] = PeftMixedModel
    else:
        kind = model_class(peft_config)
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)


def get_peft_model_state_dict(
    model: nn.Module, adapter_name: str = "default", save_embedding_layers: bool | str = "auto"
) -> dict[str, Tensor]:
    """The tensors of one adapter, keyed as its file keys them."""
    return checkpoint.adapter_state_dict(adapters_of(model), adapter_name, save_embedding_layers=save_embedding_layers)


def set_peft_model_state_dict(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str = "default") -> None:
    """Load a file's tensors into an adapter that is already attached.

    Raises:
        InputErrors: listing every missing, unexpected and mis-shaped tensor.
    """
    checkpoint.load_state(adapters_of(model), adapter_name, state_dict)


def inject_adapter_in_model(
    peft_config: PeftConfig, model: nn.Module, adapter_name: str = "default", low_cpu_mem_usage: bool = False
) -> nn.Module:
    """Attach an adapter without wrapping the model in a PeftModel."""
    attach(model, peft_config, adapter_name)
    return model


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The batch size of a forward call, where its inputs tell."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    return None
