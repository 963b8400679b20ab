"""Configs: one dataclass a method, with PEFT's field names, read strictly and written so that every PEFT can read them.

A field annotation carries its bounds (`Annotated[int, Ge(1)]`), so one declaration serves the Python API, recipes,
`adapter_config.json` and the JSON schema. A field that PEFT 0.13.0 does not know is declared with `later(...)`: it is
written only when it differs from its default, since 0.13.0 refuses files with unknown keys.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from peftcli.adapters.targets import is_all_linear
from peftcli.allowed import allowed, meant
from peftcli.errors import ArgumentTypeError, InputError, InputErrors, nearest, printable
from peftcli.files import read_strict_json

if TYPE_CHECKING:
    from peftcli.adapters.registry import Method

CONFIG_NAME = "adapter_config.json"
MAX_NAME = 4096  # of a base model; the longest path Linux takes

INPUT_EMBEDDINGS = "input embeddings"

Config = TypeVar("Config", bound="PeftConfig")
Nested = TypeVar("Nested")

# Keys of later PEFT versions that say nothing about the maths.
IGNORED_KEYS = frozenset({"peft_version"})
NAMES_OF_BASE = frozenset({"base_model_name_or_path", "revision", "auto_mapping"})


class TaskType(str, Enum):
    """What the adapted model is trained to do (PEFT's names)."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


AUTO_CLASSES = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}
"""The transformers class that loads the base for a task."""

HEADS: dict[TaskType | None, list[str]] = {
    TaskType.SEQ_CLS: ["classifier", "score"],
    TaskType.TOKEN_CLS: ["classifier", "score"],
    TaskType.QUESTION_ANS: ["qa_outputs"],
}
"""Heads that a task trains in full: the base was published without them."""


def later(default: Any, *, since: str) -> Any:
    """A field PEFT 0.13.0 does not know: written only when it differs from `default`."""
    metadata = {"since": since}
    if isinstance(default, (list, dict, set)):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def runtime(default: Any) -> Any:
    """A field that steers this process only and is never written."""
    return field(default_factory=lambda: copy.copy(default), metadata={"saved": False})


class ConfigType(type):
    """Lets a config be made with `peft_type=...`, as PEFT's documentation does: it must be the class's own."""

    def __call__(cls, *args: Any, peft_type: str | None = None, **given: Any) -> Any:
        own = cls.__dict__.get("peft_type")
        if peft_type is not None and _plain(peft_type) != own:
            raise InputError(f"is {printable(peft_type)!r}, but this is {cls.__name__}", field="peft_type", allowed=own)
        known = [item.name for item in fields(cast(Any, cls)) if item.init]
        if unknown := sorted(given.keys() - set(known)):
            raise ArgumentTypeError(
                f"{cls.__name__}.__init__() got an unexpected keyword argument '{unknown[0]}'",
                fix=str(nearest(unknown[0], known))
                or "peftcli may not have what this field of PEFT's does: leave it out",
            )
        return super().__call__(*args, **given)


@dataclass
class PeftConfig(metaclass=ConfigType):
    """Fields every adapter config has.

    Attributes:
        task_type: one of `TaskType`, or None for a custom model.
        base_model_name_or_path: the base the adapter belongs to; a name, never a path we follow on our own.
        revision: revision of the base on the hub.
        auto_mapping: class and library of a base that has no task type (PEFT's field; never imported by us).
        inference_mode: True in files; adapters are loaded frozen unless `is_trainable=True`.
    """

    peft_type: ClassVar[str] = ""
    """PEFT's name of the method, e.g. LORA."""

    inert_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of other versions that say nothing on their own (`qalora_group_size` without `use_qalora`)."""

    absent: ClassVar[frozenset[str]] = frozenset()
    """Fields of a base class that PEFT's config of this method does not have: not taken and not written."""

    is_prompt_learning: ClassVar[bool] = False
    allows_checkpointing: ClassVar[bool] = True
    """Whether layers may be recomputed in the backward pass."""
    prefix: ClassVar[str] = ""
    """What the names of this method's tensors start with."""

    task_type: TaskType | str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: dict[str, Any] | None = None
    inference_mode: bool = False
    file_keys: frozenset[str] = field(
        default=frozenset(), metadata={"saved": False}, kw_only=True, repr=False, compare=False
    )
    """The keys of the file it was read from: they tell old versions' files."""

    @property
    def task(self) -> TaskType | None:
        """`task_type` if it is one of the known ones."""
        return TaskType(self.task_type) if self.task_type in set(TaskType) else None

    def add_heads(self) -> None:
        """Name the heads of the task among the modules trained in full, for methods that have such."""
        if any(item.name == "modules_to_save" for item in config_fields(type(self))):
            given = getattr(self, "modules_to_save", None) or []
            if isinstance(given, str):
                return  # one name where a list belongs: `check` says so
            given = list(given)
            heads = [head for head in HEADS.get(self.task, []) if head not in given]
            self.modules_to_save = given + heads or None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; sets become sorted lists, so equal configs give equal text."""
        values = {item.name: _plain(getattr(self, item.name)) for item in config_fields(type(self))}
        return {"peft_type": self.peft_type, **values}

    def to_saved_dict(self) -> dict[str, Any]:
        """What `adapter_config.json` holds: PEFT 0.13.0's keys, and later ones only where they say something."""
        values = self.to_dict()
        values["inference_mode"] = True
        for item in config_fields(type(self)):
            if "since" in item.metadata and values[item.name] == _plain(default_of(item)):
                del values[item.name]
        return values

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `adapter_config.json` into a folder."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / CONFIG_NAME).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        # What is inside a field stays in order: the first pattern that matches counts.
        values = dict(sorted(self.to_saved_dict().items()))
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any], *, place: str | Path = "adapter config") -> Config:
        """A config from untyped values, every field checked.

        Raises:
            InputErrors: listing every unknown, mistyped and out-of-range field.
        """
        return build_config(cls, values, place=place)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> PeftConfig:
        """The config saved in a folder or on the hub; its class follows the file's `peft_type`.

        Args:
            pretrained_model_name_or_path: the adapter.
            options: where on the hub (`subfolder`, `revision`, `token`, ...); fields to set to something else.
        """
        from peftcli.adapters.checkpoint import HUB_OPTIONS, resolve_adapter_folder

        hub = {name: options.pop(name) for name in HUB_OPTIONS & options.keys()}
        config = read_config(resolve_adapter_folder(pretrained_model_name_or_path, **hub) / CONFIG_NAME)
        return dataclasses.replace(config, **options)

    @classmethod
    def from_peft_type(cls, *, peft_type: str, **fields: Any) -> PeftConfig:
        """A config of the method `peft_type` names."""
        from peftcli.adapters.registry import config_class

        return config_class(str(_plain(peft_type)))(**fields)

    @classmethod
    def from_json_file(cls, path_json_file: str | Path) -> dict[str, Any]:
        """What a config's file says, unchecked."""
        return read_strict_json(Path(path_json_file))

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> None:
        """Refused: peftcli uploads nothing."""
        raise InputError(
            "peftcli uploads nothing",
            field="push_to_hub",
            fix=f"save_pretrained(folder), look at what is in there, then `hf upload {repo_id} FOLDER`",
        )

    @property
    def is_adaption_prompt(self) -> bool:
        return self.peft_type == "ADAPTION_PROMPT"

    def means_the_same(self, other: PeftConfig) -> bool:
        """Whether two configs describe adapters of the same tensors and equation, whatever their base is called."""
        ours, theirs = self.to_saved_dict(), other.to_saved_dict()
        return all(ours.get(key) == theirs.get(key) for key in {*ours, *theirs} - NAMES_OF_BASE)

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A file's values in today's terms, where PEFT changed what its keys mean. Methods extend it."""
        return values

    def validate(self) -> None:
        """Check fields against each other; called before an adapter is attached. Methods extend it."""
        if self.task_type is not None and self.task is None:
            tasks = ", ".join(task.value for task in TaskType)
            raise InputError(
                f"Invalid task type: '{printable(self.task_type)}'. Must be one of the following task types: {tasks}.",
                field="task_type",
            )
        for name in ("base_model_name_or_path", "revision"):
            fault = name_fault(getattr(self, name) or "")
            if fault:
                raise InputError(fault, field=name, allowed="the id of a model on the hub, or a folder")
        for item in fields(self):
            if item.name in self.absent and getattr(self, item.name) != default_of(item):
                raise InputError(f"{type(self).__name__} has no such field", field=item.name)

    def check(self) -> None:
        """`validate`, and each field by itself: a config made in Python has not been checked yet.

        Raises:
            InputErrors: with every problem of single fields, if fields do not fit each other for no other reason.
        """
        problems = field_problems(type(self), {item.name: getattr(self, item.name) for item in fields(self)})
        try:
            self.validate()
        except TypeError:
            if not problems:
                raise
        if problems:
            raise problems[0] if len(problems) == 1 else InputErrors(problems)

    def stored(self: Config) -> Config:
        """The config that belongs to the tensors `Adapter.stored` gives."""
        return self

    def begin_training(self, total_steps: int) -> None:
        """Learn how many optimizer steps there will be; the training loop says so."""

    def check_beside(self, others: list[PeftConfig]) -> None:
        """Refuse to stand in one model with these. Methods whose adapters share something extend it."""

    def follow_file(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Correct what an adapter's file shows to be otherwise, from the shapes of its tensors by key."""

    def locate(self, folder: Path, experts: dict[str, str] | None) -> None:
        """Find what else the adapter needs, from the folder its files are in and what the caller gives (X-LoRA)."""

    def adapter_variant(self) -> Method | None:
        """Another adapter class than the registry's, where a field asks for one (DoRA)."""
        return None


@dataclass
class TunerConfig(PeftConfig):
    """Fields of the methods that adapt modules inside the model.

    Attributes:
        target_modules: names (a module matches if its name is one of them or ends with `.` + one), a regular
            expression for the whole name, `all-linear`, or None for the model type's usual ones.
        exclude_modules: names or expression taken out of the matches.
        modules_to_save: modules trained in full and stored beside the adapter (a new head, for instance).
        layers_to_transform: indices of the layers to adapt; all when None.
        layers_pattern: name of the list those indices count in, where it is not the usual one.
    """

    default_tables: ClassVar[dict[str, str]] = {"target_modules": "targets"}
    """Fields that are filled in from the model when they are None: the table of target_defaults.yaml they come from, or
    `INPUT_EMBEDDINGS` for the module itself."""

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = later(None, since="0.14")
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        self.target_modules = as_set(self.target_modules)
        self.exclude_modules = as_set(self.exclude_modules)

    def validate(self) -> None:
        super().validate()
        if self.layers_to_transform is not None and isinstance(self.target_modules, str) and not self.is_all_linear:
            raise InputError(
                "`layers_to_transform` cannot be used when `target_modules` is a str.",
                field="layers_to_transform",
                fix="give target_modules as a list, or write the layer numbers into the expression",
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise InputError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified.",
                field="layers_pattern",
            )

    def check_model_type(self, model_type: str | None) -> None:
        """Refuse a base of a type that the method can't adapt. Methods that know some types only extend it."""

    def narrowed(self, modules: list[str]) -> list[str]:
        """Those meant of the modules that match, in the model's order. Methods with a choice of their own extend it."""
        return modules

    def companions(self) -> list[TunerConfig]:
        """What else the adapter does, under its name but at modules of their own (LoRA: trainable tokens)."""
        return []

    def parameter_method(self, experts: int) -> Method:
        """The adapter class for a bare parameter, where the config can target some; `experts` matrices are fused in it."""
        raise InputError(f"{self.peft_type} can't adapt parameters", field="target_parameters")

    def settle_targets(self, chosen: list[str]) -> None:
        """Make other fields agree with the modules that were chosen, before the config is saved."""

    @property
    def is_all_linear(self) -> bool:
        return is_all_linear(self.target_modules)


def require_config(config: object) -> None:
    """Refuse what is no config, e.g. a dictionary or a path."""
    if not isinstance(config, PeftConfig):
        raise ArgumentTypeError(
            f"The input config must be a PeftConfig, got {type(config)}",
            fix="get_peft_config makes one of a dictionary, PeftConfig.from_pretrained of a folder",
        )


def config_fields(cls: type[PeftConfig]) -> list[Field[Any]]:
    """The fields a file or a recipe may hold: PEFT's of this method, without those of the running process."""
    return [item for item in fields(cls) if item.name not in cls.absent and item.metadata.get("saved", True)]


def default_of(item: Field[Any]) -> Any:
    """A field's default value."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def read_config(path: Path) -> PeftConfig:
    """Read and check an `adapter_config.json` of any method.

    Raises:
        InputErrors: with every problem found in the file.
    """
    from peftcli.adapters.registry import config_class

    values = read_strict_json(path)
    peft_type = values.get("peft_type")
    if not isinstance(peft_type, str):
        raise InputError(f"is {printable(peft_type)}, not a string", place=path, field="peft_type")
    cls = config_class(peft_type, place=path)
    config = build_config(cls, cls.upgrade(values), place=path)
    config.file_keys = frozenset(values)
    return config


def build_config(cls: type[Config], values: dict[str, Any], *, place: str | Path) -> Config:
    """Check `values` against the annotations of `cls` and build it. Unknown keys are refused unless they hold nothing."""
    known = {item.name for item in config_fields(cls)}
    given = {name: value for name, value in values.items() if name in known}
    problems = [
        InputError(
            f"unknown field of {cls.__name__} with the value {printable(value, 80)}: the maths may differ",
            place=place,
            field=name,
            fix=str(nearest(name, known)) or "the file needs a newer version, or the field is not supported",
        )
        for name, value in values.items()
        if name not in known | IGNORED_KEYS | cls.inert_keys | {"peft_type"} and _says_something(value)
    ]
    problems += field_problems(cls, given, place=place)
    if problems:
        raise problems[0] if len(problems) == 1 else InputErrors(problems)
    config = cls(**given)
    try:
        config.validate()
    except InputError as error:
        raise error.at(place=place) from None
    return config


def build_nested(cls: type[Nested], values: dict[str, Any], *, field: str) -> Nested:
    """A dataclass that is the value of a config's field (LoftQ's settings), checked as strictly as the config."""
    known = {item.name for item in fields(cast(Any, cls))}
    problems = [
        InputError("unknown field", field=f"{field}.{name}", fix=str(nearest(name, known)) or None)
        for name in values
        if name not in known
    ]
    known_values = {name: value for name, value in values.items() if name in known}
    for problem in field_problems(cast(Any, cls), known_values, place=""):
        problems.append(problem.at(field=f"{field}.{problem.field}"))
    if problems:
        raise problems[0] if len(problems) == 1 else InputErrors(problems)
    return cls(**values)


def field_problems(
    cls: type[PeftConfig], values: dict[str, Any], *, place: str | Path | None = None
) -> list[InputError]:
    """One problem for each value that does not fit its field's annotation (strictly: no `"8"` for 8, no True for 1)."""
    from pydantic import ValidationError

    problems = []
    for name, value in values.items():
        try:
            _field_adapters(cast(Any, cls))[name].validate_python(value, strict=True)
        except ValidationError as error:
            problems.append(_field_problem(name, value, error, place))
    return problems


def _field_problem(name: str, value: Any, error: Any, place: str | Path | None) -> InputError:
    """The value, where inside it the fault is, and what it should have been."""
    reasons = error.errors(include_url=False, include_input=False)[:6]
    keys = value if isinstance(value, dict) else ()  # pydantic also names the member of a union it tried
    inside = [".".join(str(part) for part in item["loc"] if isinstance(part, int) or part in keys) for item in reasons]
    where = next((text for text in inside if text), "")
    if where:  # a value of the right type says more about what is meant than the types it doesn't have
        reasons = [item for item, text in zip(reasons, inside, strict=True) if text == where]
    shown = printable(repr(value), 80)
    problem = "is empty" if value is None else f"{shown} is not accepted" + (f" (at {where})" if where else "")
    return InputError(problem, place=place, field=name, allowed=allowed(reasons), fix=meant(value, reasons))


@cache
def _field_adapters(cls: type[PeftConfig]) -> dict[str, Any]:
    """A strict validator for each field, built once a class."""
    from typing import get_type_hints

    from pydantic import ConfigDict, TypeAdapter

    hints = get_type_hints(cls, include_extras=True)
    config = ConfigDict(strict=True, allow_inf_nan=False)

    def adapter(annotation: Any) -> Any:
        try:
            return TypeAdapter(annotation, config=config)
        except Exception:  # a dataclass or model carries its own configuration
            return TypeAdapter(annotation)

    return {item.name: adapter(hints[item.name]) for item in fields(cls)}


def name_fault(name: str) -> str | None:
    """Why a name from a file can be neither a folder nor a hub id, or None. What it names is not looked at."""
    if len(name) > MAX_NAME:
        return f"is {len(name):,} characters long"
    if "\0" in name:
        return f"{printable(repr(name))} holds a NUL character"
    if name.startswith(("-", "~")):
        return f"{printable(repr(name))} starts like an option or a home folder, which it can't be"
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    return value


def as_set(value: Any) -> Any:
    """A list as a set; anything else as it is."""
    return set(value) if isinstance(value, (list, tuple)) else value


def _says_something(value: Any) -> bool:
    return value not in (None, False, {}, [], "")


def as_tuner_config(config: PeftConfig) -> TunerConfig:
    """`config`, known to adapt modules. Prompt learning configs are refused with PEFT's words."""
    if not isinstance(config, TunerConfig):
        raise InputError("`create_and_replace` does not support prompt learning and adaption prompt yet.")
    return config
