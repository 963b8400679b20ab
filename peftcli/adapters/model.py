"""`PeftModel`: the public face of the engine, with PEFT's names and words.

A PeftModel holds a `Tuner` (`base_model`), which holds the user's model (`base_model.model`): that is where the parts of
every checkpoint key come from. With a prompt, `base_model` is the user's model itself and `prompt_encoder` stands beside.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters import checkpoint, status
from peftcli.adapters.batch import batch_facts
from peftcli.adapters.card import update_card
from peftcli.adapters.config import PeftConfig, require_config
from peftcli.adapters.conversion import supports_lora_conversion
from peftcli.adapters.engine import Attached, adapters_of, attached_to
from peftcli.adapters.fingerprint import fingerprint
from peftcli.adapters.loading import SavedAdapter, open_adapter
from peftcli.adapters.prompt import attach_prompt, prompt_of_batch
from peftcli.adapters.prompt_base import PromptLearningConfig
from peftcli.adapters.state import LoadResult, fitting_sizes, get_peft_model_state_dict
from peftcli.adapters.tied_state import keep_tied_once
from peftcli.adapters.tuner import Tuner, tuner_class
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
        self.base_model = model if peft_config.is_prompt_learning else self.tuner_for(peft_config)(model)
        self.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype, **options)
        if peft_config.is_prompt_learning:
            self.prompt_encoder = self.attached.prompts
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            cast(Any, model).enable_input_require_grads()  # else the first checkpointed block sees nothing to train
        keep_tied_once(self)

    @classmethod
    def tuner_for(cls, peft_config: PeftConfig) -> type[Tuner]:
        """The class of `base_model` for a first adapter."""
        return tuner_class(peft_config.peft_type)

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
        require_config(peft_config)
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
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> LoadResult:
        """Load a saved adapter beside the others, or its tensors into the one of that name and the same config.

        The model goes to eval mode unless the adapter is to be trained. Accepted for PEFT's sake: `torch_device` (tensors go
        where their module is), `ephemeral_gpu_offload` and `low_cpu_mem_usage` (nothing is made to be thrown away).
        """
        opening = {"is_trainable": is_trainable, "allow_pickle": allow_pickle, "key_mapping": key_mapping}
        saved = open_adapter(model_id, self.attached.base, hub=hub, **opening)  # type: ignore[arg-type]
        config = saved.config
        again = adapter_name in self.peft_config and self.peft_config[adapter_name].means_the_same(config)
        if not again:
            self.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype, initialize=False)
        try:
            self._take(saved, adapter_name, ignore_mismatched_sizes)
        except InputError:
            if not again:
                self.delete_adapter(adapter_name)
            raise
        if is_trainable:
            self.attached.set_requires_grad(adapter_name, True)
        else:
            self.eval()
        return LoadResult([], [])

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
        return attached.own_configs() if attached else {}

    @property
    def attached(self) -> Attached:
        """The engine's view of the adapters."""
        return adapters_of(self)

    @property
    def active_adapters(self) -> list[str]:
        return self.attached.active

    @property
    def active_adapter(self) -> str:
        if not self.active_adapters:
            raise InputError("no adapter is active")
        return self.active_adapters[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> str:
        return self.active_peft_config.peft_type

    @property
    def modules_to_save(self) -> set[str] | None:
        """The modules any adapter trains in full."""
        return {name for c in self.peft_config.values() for name in getattr(c, "modules_to_save", None) or ()} or None

    @property
    def base_model_torch_dtype(self) -> Any:
        return getattr(self.base_model, "dtype", None)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train adapters, or no longer; which ones are active stays."""
        if not isinstance(self.base_model, Tuner):
            raise TypeError(
                f"Setting `requires_grad` is not supported for prompt learning methods like {self.peft_type}."
            )
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None) -> Any:
        """The active prompt of a batch: embeddings [B, tokens, width], or a cache of each layer's keys and values."""
        return prompt_of_batch(self.attached.prompt_of(self.active_adapter), batch_size, task_ids)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """What a prompt's file holds [tokens, width]."""
        return self.attached.prompt_of(adapter_name).stored()["prompt_embeddings"].detach().cpu()

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """What adapters each adapted layer has, and their state."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """The same of all layers together."""
        return status.get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` can turn an adapter into LoRA."""
        return supports_lora_conversion(self, adapter_name)

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
        with batch_facts(self, args, kwargs, adapter_names, task_ids):
            return self.base_model(*args, **kwargs)

    def generate(
        self, *args: Any, adapter_names: list[str] | None = None, task_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The model's `generate`, also with an adapter or a task for each row. Beam search repeats them."""
        with batch_facts(self, args, kwargs, adapter_names, task_ids, generating=True):
            return cast(Any, self.get_base_model()).generate(*args, **kwargs)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the user's model takes `num_items_in_batch`, which `transformers.Trainer` then passes."""
        model = self.get_base_model()
        kinds = {parameter.kind for parameter in inspect.signature(model.forward).parameters.values()}
        return getattr(model, "accepts_loss_kwargs", inspect.Parameter.VAR_KEYWORD in kinds)

    # -- parameters -----------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters; packed 4-bit weights count as what they stand for, sharded ones whole."""
        return status.count_parameters(self)

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
        path_initial_model_for_weight_conversion: str | Path | None = None,
        state_dict: dict[str, Tensor] | None = None,
        save_function: Any = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write adapters as PEFT does: `default` into the folder itself, others into a sub-folder of their name.

        Args:
            save_directory: where to.
            safe_serialization: only True: pickles are not written.
            selected_adapters: which ones; all by default.
            save_embedding_layers: also the base's embeddings: True, False, or `auto`: if tokens were added.
            is_main_process: False writes nothing.
            path_initial_model_for_weight_conversion: accepted: starts taken from the base are always stored converted.
            state_dict: tensors by the model's own names, where they were gathered from several processes.
            save_function, max_shard_size: accepted: transformers and accelerate pass theirs. An adapter is one file.
            push_to_hub: only False: peftcli uploads nothing.
        """
        if push_to_hub:
            self.push_to_hub(Path(save_directory).name)
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
            state = get_peft_model_state_dict(self, state_dict, name, save_embedding_layers=save_embedding_layers)
            checkpoint.save_adapter(
                self.attached, name, folder, state=state, save_embedding_layers=save_embedding_layers
            )
        if is_main_process:
            self.create_or_update_model_card(save_directory)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write or update `README.md`: what a hub needs to know of the active adapter. Its text is kept."""
        update_card(Path(output_dir) / "README.md", self)

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> None:
        """Refused: peftcli uploads nothing."""
        self.active_peft_config.push_to_hub(repo_id)

    @classmethod
    def class_for(cls, config: PeftConfig) -> type[PeftModel]:
        """The class a config's task asks for; without one, the class that was asked."""
        from peftcli.adapters.task_models import model_class

        return model_class(config) if config.task else cls

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        torch_device: str | None = None,
        key_mapping: dict[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> PeftModel:
        """A model with a saved adapter, frozen and in eval mode unless `is_trainable`. Other arguments: see `load_adapter`.

        Raises:
            InputErrors: listing every tensor the file lacks, has too much, or has in another shape.
        """
        before = attached_to(model)
        saved = open_adapter(
            model_id,
            before.base if before else fingerprint(model),
            config=config,
            is_trainable=is_trainable,
            allow_pickle=allow_pickle,
            key_mapping=key_mapping,
            hub=hub,
        )
        wrapper = cls.class_for(saved.config)(
            model, saved.config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, initialize=False
        )
        try:
            wrapper._take(saved, adapter_name, ignore_mismatched_sizes)
        except InputError:
            wrapper.attached.unload(merge=False)  # the caller's model comes back as it was
            raise
        return wrapper if is_trainable else wrapper.eval()

    def _take(self, saved: SavedAdapter, name: str, ignore_mismatched_sizes: bool) -> None:
        fitting = fitting_sizes if ignore_mismatched_sizes else lambda attached, name, tensors: tensors
        checkpoint.load_state(self.attached, name, fitting(self.attached, name, saved.tensors), place=saved.folder)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the tuner's, or the user's model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)
