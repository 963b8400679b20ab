"""The base model of a run: where it is, whether it can be trusted and trained, and how it is loaded.

A base is data. Its config is read strictly and cleaned before transformers sees it: Python code that comes with it is
run only if the recipe says so, attention kernels it names are not fetched, an adapter that lies in its folder is not
loaded along. What can't work is refused by name before memory is allocated.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch  # noqa: TID253

from peftcli.adapters.base_facts import BaseFacts
from peftcli.adapters.config import AUTO_CLASSES, TaskType
from peftcli.adapters.config import CONFIG_NAME as ADAPTER_CONFIG
from peftcli.errors import InputError, InputErrors, RunError, nearest, printable
from peftcli.recipe.task_rules import WITH_CLASSES
from peftcli.training.base_checks import CONFIG, check_base, needs_remote_code
from peftcli.training.locate import resolve_base
from peftcli.training.quantized import check_quantization, prepare, quantization_config
from peftcli.training.quiet import quiet_transformers
from peftcli.training.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from peftcli.recipe.schema import ModelSection, QuantizationSection

GENERATIVE = frozenset({"CAUSAL_LM", "SEQ_2_SEQ_LM"})
"""Task types whose head comes with the base; others start with a fresh one."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
INTEGERS = frozenset({"BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})


@dataclass(frozen=True)
class OpenedBase:
    """A base that was found and checked, of which no weight has been read.

    Attributes:
        section: the recipe's section.
        facts: its config and the headers of its weights.
        config: transformers' config, cleaned.
        stored_dtype: what most of the weights are in the checkpoint.
        dtype: what they are loaded as.
    """

    section: ModelSection
    facts: BaseFacts
    config: PreTrainedConfig
    stored_dtype: torch.dtype
    dtype: torch.dtype

    def empty(self) -> PreTrainedModel:
        """The model without its weights, on whatever device is current: `meta`, or fake tensors of a real one.

        Raises:
            InputErrors: listing every weight that is not stored as the model has it.
        """
        with _explained(self.section, self.facts), quiet_transformers():
            model = self.auto_class.from_config(
                self.config,
                dtype=self.dtype,
                attn_implementation=_attention(self.section),
                trust_remote_code=self.section.trust_remote_code,
            )
        name_base(model, self.section.name_or_path)
        if problems := list(_misfits(model, self.facts)):
            raise InputErrors(problems)
        return model

    @property
    def auto_class(self) -> Any:
        import transformers

        return getattr(transformers, AUTO_CLASSES[TaskType(self.section.task_type)])


def open_base(model: ModelSection) -> OpenedBase:
    """Find and check a base; its config, cleaned.

    Raises:
        InputErrors: with everything that is wrong with it.
    """
    folder = resolve_base(model.name_or_path, model.revision, trust_remote_code=model.trust_remote_code)
    facts = check_base(folder, trust_remote_code=model.trust_remote_code)
    config = _read_config(facts, model.trust_remote_code)
    if model.task_type in WITH_CLASSES:
        _set_classes(config, model, facts)
    stored = _stored_dtype(facts, config)
    return OpenedBase(model, facts, config, stored, stored if model.dtype == "auto" else getattr(torch, model.dtype))


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with its chat template and a pad token.

    Raises:
        InputError: if the base or its tokenizer can't be used.
    """
    base = open_base(model)
    return read_tokenizer(base.facts, trust_remote_code=model.trust_remote_code)


def meta_base(model: ModelSection) -> PreTrainedModel:
    """The base on the meta device: every module and shape, no weights.

    Raises:
        InputErrors: if config and weights don't fit together, or the base can't be used.
    """
    with torch.device("meta"):
        return open_base(model).empty()


def load_base(
    model: ModelSection, quantization: QuantizationSection | None = None, *, device: torch.device | str | None = None
) -> PreTrainedModel:
    """The base with its weights, in eval mode. A quantised one is frozen and made fit to train on.

    Args:
        model: the recipe's section.
        quantization: load the linear layers in 4 or 8 bits; None also takes a base that is stored so.
        device: where to; `training_device()` when None.

    Raises:
        InputErrors: if it can't be used.
        RunError: if it does not fit into memory.
    """
    device = torch.device(device) if device is not None else training_device()
    base = open_base(model)
    check_quantization(quantization, base.facts)
    with torch.device("meta"):
        empty = base.empty()  # refuses shapes that don't fit before they are allocated
    arguments: dict[str, Any] = {}
    if device.type != "cpu":
        arguments["device_map"] = {"": device}
    if quantization is not None and "quantization_config" not in base.facts.config:
        arguments["quantization_config"] = quantization_config(quantization, empty)
    with _explained(model, base.facts), quiet_transformers(), _without_adapter(base.facts.folder) as folder:
        loaded, report = base.auto_class.from_pretrained(
            folder,
            config=base.config,
            dtype=base.dtype,
            attn_implementation=_attention(model),
            trust_remote_code=model.trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **arguments,
        )
    _check_complete(loaded, report, model.task_type, base.facts)
    name_base(loaded, model.name_or_path)
    prepare(loaded)
    return loaded.eval()


def training_device() -> torch.device:
    """The device of this process: under a launcher the card of its local rank."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def _read_config(facts: BaseFacts, trust_remote_code: bool) -> PreTrainedConfig:
    """transformers' config for the base, built from values that were read strictly."""
    from transformers import CONFIG_MAPPING, AutoConfig

    place = facts.folder / CONFIG
    own_code = "auto_map" in facts.config
    if own_code and trust_remote_code:
        return AutoConfig.from_pretrained(facts.folder, trust_remote_code=True, local_files_only=True)
    if (model_type := facts.model_type or "") not in CONFIG_MAPPING:
        if own_code:
            raise needs_remote_code(facts)
        raise InputError(
            f"unknown model type {printable(repr(facts.config.get('model_type')))}",
            place=place,
            field="model_type",
            fix=f"{nearest(model_type, CONFIG_MAPPING)} a newer transformers may know it".strip(),
        )
    if own_code:
        warnings.warn(f"{place}: auto_map is ignored; transformers' own {model_type} code is used", stacklevel=4)
    try:
        return CONFIG_MAPPING[model_type].from_dict(_cleaned(facts.config))
    except Exception as error:  # each model type checks in its own way
        raise InputError(f"is no config of a {model_type}: {printable(error)}", place=place) from error


def _set_classes(config: PreTrainedConfig, model: ModelSection, facts: BaseFacts) -> None:
    """Names and number of the classes; and the pad token, by which a decoder that classifies finds a text's end."""
    if model.labels is not None:
        config.id2label = dict(enumerate(model.labels))
        config.label2id = {name: index for index, name in enumerate(model.labels)}
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = read_tokenizer(facts, trust_remote_code=model.trust_remote_code).pad_token_id


def _attention(section: ModelSection) -> str | None:
    """What to ask transformers for: where nothing is, it takes `sdpa`, or `eager` for models that know no other."""
    return None if section.attn_implementation == "sdpa" else section.attn_implementation


def _cleaned(values: dict[str, Any]) -> dict[str, Any]:
    """A config without what the base must not decide: private keys (kernels among them) and code of its own."""
    unwanted = ("attn_implementation", "auto_map", "trust_remote_code", "use_kernels")
    return {
        key: _cleaned(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if not key.startswith("_") and key not in unwanted
    }


def _stored_dtype(facts: BaseFacts, config: PreTrainedConfig) -> torch.dtype:
    """What most of the checkpoint's bytes are; the config's word where the checkpoint is quantised."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in facts.tensors.values():
        if tensor.dtype in DTYPES:
            dtype = DTYPES[tensor.dtype]
            sizes[dtype] = sizes.get(dtype, 0) + tensor.nbytes
    named = getattr(config, "dtype", None)
    if not sizes or ("quantization_config" in facts.config and named is not None):
        return named or torch.float32
    return max(sizes, key=lambda dtype: sizes[dtype])


def _misfits(model: PreTrainedModel, facts: BaseFacts) -> Iterator[InputError]:
    if "quantization_config" in facts.config:
        return  # packed weights have shapes and types of their own
    for name, tensor in model.state_dict().items():
        stored = facts.find(name)
        if stored is not None and tensor.is_floating_point() and stored.dtype in INTEGERS:
            problem = f"is stored as {stored.dtype}: whole numbers are no weights, unless {CONFIG} says how they are quantised"
            yield InputError(problem, place=facts.folder, field=name)
        if stored is not None and stored.shape != tuple(tensor.shape):
            yield InputError(
                f"has the shape {list(stored.shape)} in the checkpoint, but {CONFIG} makes it {list(tensor.shape)}",
                place=facts.folder,
                field=name,
            )


def _check_complete(model: PreTrainedModel, report: dict[str, Any], task_type: str, facts: BaseFacts) -> None:
    """Every weight must come from the checkpoint, but for the fresh head of a classifier."""
    inner = f"{model.base_model_prefix}."
    missing = [name for name in report["missing_keys"] if task_type in GENERATIVE or name.startswith(inner)]
    if missing:
        raise InputErrors(InputError("is missing", place=facts.folder, field=printable(name)) for name in missing)
    # A checkpoint of another task has another head, and perhaps a pooler.
    if (unused := sorted(report["unexpected_keys"])) and task_type in GENERATIVE:
        warnings.warn(
            f"{facts.folder}: {len(unused)} tensors of the checkpoint have no place in the model, "
            f"{printable(unused[0])} for one",
            stacklevel=3,
        )


def name_base(model: PreTrainedModel, name: str) -> None:
    """Let the model, and the adapters made for it, be known by the recipe's name, not by a folder in some cache."""
    model.name_or_path = model.config.name_or_path = name


@contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """`folder`, or a view of it without the adapter that transformers would load along (where PEFT is installed)."""
    if not (folder / ADAPTER_CONFIG).exists():
        yield folder
        return
    with TemporaryDirectory() as view:
        for item in folder.iterdir():
            if item.name != ADAPTER_CONFIG:
                (Path(view) / item.name).symlink_to(item.resolve())
        yield Path(view)


@contextmanager
def _explained(section: ModelSection, facts: BaseFacts) -> Iterator[None]:
    """Turn transformers' errors about a base into ours."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(f"{facts.folder}: the base does not fit into memory: {printable(error)}") from error
    except (InputError, RunError):
        raise
    except Exception as error:  # each model type fails in its own way at sizes it can't have
        raise InputError(
            f"can't be loaded as {AUTO_CLASSES[TaskType(section.task_type)]}: {printable(error, 600)}",
            place=facts.folder,
            field="model",
        ) from error
