"""The `adapter:` section: `method` and the fields of that method's PEFT config, checked by the config's own class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Literal

from pydantic import InstanceOf, ValidationError, model_serializer, model_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import InitErrorDetails, PydanticCustomError

from peftcli.adapters.config import PeftConfig, config_fields, field_problems
from peftcli.adapters.registry import config_class, method_names
from peftcli.adapters.targets import fullmatch
from peftcli.errors import InputError, InputErrors, nearest, printable
from peftcli.recipe.section import Section

FULL = "full"
"""The method that adapts nothing and trains every weight: the baseline."""

LORA_WITH = {
    "qlora": "quantization.load_in_4bit=true",
    "dora": "adapter.use_dora=true",
    "rslora": "adapter.use_rslora=true",
    **dict.fromkeys(("lora+", "loraplus"), "training.loraplus_lr_ratio=16"),
    **{name: f"adapter.init_lora_weights={name}" for name in ("pissa", "olora", "loftq", "eva", "corda", "lora_ga")},
}
"""Names that are LoRA with one field set, as an override sets it. A sweep takes them for methods."""

VARIANTS = {
    **{
        name: f"method: lora, with {setting.removeprefix('adapter.').replace('=', ': ')}"
        for name, setting in LORA_WITH.items()
    },
    **dict.fromkeys(("none", "full_finetuning", "sft", "freeze"), f"method: {FULL}"),
}
"""What to write instead of a name that is no method."""
ELSEWHERE = {
    "peft_type": "it follows from adapter.method",
    "task_type": "set model.task_type",
    "base_model_name_or_path": "set model.name_or_path",
    "revision": "set model.revision",
    "auto_mapping": "leave it out: it belongs to saved files",
    "inference_mode": "leave it out: it belongs to saved files",
    "peft_version": "leave it out: it belongs to saved files",
}
"""Fields of PEFT's configs that a recipe says in another place."""


class AdapterSection(Section):
    """The method and its fields. Every field of the method's PEFT config may be set, by its name there."""

    method: str
    """PEFT's name of the method in lower case, or `full` for training without an adapter."""
    config: SkipJsonSchema[InstanceOf[PeftConfig] | None]
    """The method's config with everything the recipe sets; None for `full`."""

    @model_validator(mode="before")
    @classmethod
    def _build(cls, values: Any) -> Any:
        if not isinstance(values, dict) or isinstance(values.get("config"), PeftConfig):
            return values
        method = values.get("method")
        if not isinstance(method, str):
            return {"config": None, **{name: value for name, value in values.items() if name == "method"}}
        method = method.lower()
        given = {name: value for name, value in values.items() if name != "method"}
        if method not in (FULL, *method_names()):
            allowed = [*method_names(), FULL]
            problem = InputError(
                f"{printable(repr(method), 80)} is not a method",
                field="method",
                allowed=", ".join(allowed),
                fix=VARIANTS.get(method) or str(nearest(method, allowed)) or None,
            )
            raise _refused(VALUE, [problem])
        config = _config(None if method == FULL else config_class(method.upper()), given)
        return {"method": method, "config": config}

    @model_serializer
    def _fields(self) -> dict[str, Any]:
        if self.config is None:
            return {"method": self.method}
        values = self.config.to_dict()
        return {"method": self.method} | {name: values[name] for name in settable(type(self.config))}


def settable(cls: type[PeftConfig]) -> Iterator[str]:
    """The fields of a config that a recipe may set."""
    return (item.name for item in config_fields(cls) if item.name not in ELSEWHERE)


def _config(cls: type[PeftConfig] | None, given: dict[str, Any]) -> PeftConfig | None:
    """The config of a method, or None for `full`, which has no fields."""
    known = list(settable(cls)) if cls else []
    unknown = [_unknown(name, known, cls) for name in given if name not in known]
    if unknown:
        raise _refused(NAME, unknown)
    if cls is None:
        return None
    problems = field_problems(cls, given, place="")
    if not problems:
        config = cls(**given)
        try:
            config.validate()
            _check_targets(config)
            _check_dropout(config)
            return config
        except InputErrors as error:
            problems = error.problems
        except InputError as error:
            problems = [error]
    raise _refused(VALUE, problems)


def _check_dropout(config: PeftConfig) -> None:
    """Refuse to drop everything: PEFT's configs allow it, but no gradient comes back through it."""
    for name in settable(type(config)):
        if name.endswith("dropout") and getattr(config, name) == 1:
            raise InputError("1.0 drops everything, so that nothing is learnt", field=name, allowed="less than 1")


def _check_targets(config: PeftConfig) -> None:
    """Refuse what could match nothing in any model: an empty list, a broken expression."""
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name, None)
        if value is not None and not value:
            raise InputError(
                "is empty: it would match nothing", field=name, fix="null means the model type's usual ones"
            )
        if isinstance(value, str) and value != "all-linear":
            fullmatch(value, "", field=name)


def _unknown(name: str, known: list[str], cls: type[PeftConfig] | None) -> InputError:
    if name in ELSEWHERE:
        return InputError("is not set here", field=name, fix=ELSEWHERE[name])
    owner = f"{cls.peft_type.lower()} has no such field" if cls else "`full` trains every weight and has no fields"
    listed = f"fields of {cls.peft_type.lower()}: {', '.join(known)}" if cls else "leave it out"
    return InputError(owner, field=name, fix=str(nearest(name, known)) or listed)


NAME: Final = "adapter_field_name"
VALUE: Final = "adapter_field_value"
"""Types of our errors in pydantic's list: about a field's name, about its value."""


def _refused(kind: Literal["adapter_field_name", "adapter_field_value"], problems: list[InputError]) -> ValidationError:
    """The problems as pydantic's own error, so that they join those of the other sections."""
    details = [
        InitErrorDetails(
            type=PydanticCustomError(
                kind, "{problem}", {"problem": item.problem, "allowed": item.allowed, "fix": item.fix}
            ),
            loc=_steps(item.field, kind),
            input=None,
        )
        for item in problems
    ]
    return ValidationError.from_exception_data("adapter", details)


def _steps(field: str | None, kind: str) -> tuple[str, ...]:
    """A value may lie inside another (`loftq_config.loftq_bits`); a name that is not known is taken whole."""
    if not field:
        return ()
    return tuple(field.split(".")) if kind == VALUE else (field,)
