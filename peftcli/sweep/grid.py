"""The runs of a sweep: every combination of the values given for a few fields, each a whole recipe, all checked first.

Needs no torch.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from peftcli.adapters.registry import config_class, method_names
from peftcli.cli.run_folder import SWEEP
from peftcli.errors import InputError, InputErrors, printable
from peftcli.recipe.adapter_section import LORA_WITH, settable
from peftcli.recipe.load import build, dump_recipe, read_tree
from peftcli.recipe.nodes import Node
from peftcli.recipe.schema import EvalSplit, Recipe

MAX_RUNS = 1000
MAX_NAME = 100  # characters
METHOD = "adapter.method"
NOT_SWEPT = ("training.output_dir", "training.resume_from_checkpoint")

_OPEN, _CLOSED, _QUOTES = "[{", "]}", "\"'"
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True)
class Axis:
    """A field and its values, as typed."""

    field: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Combination:
    """One run.

    Args:
        name: of its folder: fields and values.
        settings: value of each swept field, as typed.
        left_out: fields of the recipe's adapter that this run's method does not have.
        recipe: what is run.
    """

    name: str
    settings: dict[str, str]
    left_out: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Grid:
    """A whole sweep.

    Args:
        folder: where its runs go.
        combinations: in the order they are run, the last axis fastest.
    """

    folder: Path
    combinations: list[Combination]

    @property
    def notes(self) -> Iterator[str]:
        """What should be known before the runs are compared."""
        recipes = [combination.recipe for combination in self.combinations]
        if any(recipe.data.eval is None for recipe in recipes):
            yield "data.eval is not set: nothing tells which run is the best"
        elif len({(_seed_of_split(recipe), recipe.data.model_dump_json()) for recipe in recipes}) > 1:
            yield "the runs are evaluated on different samples, as data or training.seed differ; so metrics differ, too"


def parse_axis(text: str) -> Axis:
    """`adapter.r=8,16` taken apart. Commas inside brackets, braces and quotes belong to a value.

    Raises:
        InputError: it is no field with values, or a value comes twice.
    """
    field, equals, listed = text.partition("=")
    values = _split(listed)
    if not equals or not field or not all(values):
        raise InputError(f"{printable(repr(text))} is not `field=value,value`", field="--sweep", fix=EXAMPLE)
    if field in NOT_SWEPT:
        raise InputError("a sweep names the folders of its runs itself", field=f"--sweep {field}")
    for index, value in enumerate(values):
        if value in values[:index]:
            raise InputError(f"the value {printable(value)} comes twice", field=f"--sweep {printable(field)}")
    return Axis(field, tuple(values))


EXAMPLE = "--sweep adapter.method=lora,dora training.learning_rate=1e-4,3e-4"


def _split(text: str) -> list[str]:
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES:
            quote = character
        else:
            depth += (character in _OPEN) - (character in _CLOSED)
        if character == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def make_grid(path: Path, overrides: Sequence[str], axes: Sequence[Axis]) -> Grid:
    """Every combination of the axes' values, laid over a recipe.

    A name that is LoRA with one field set (`dora`, `rslora`, `pissa`, ...) is taken for a method. Where the method
    changes, the fields of the recipe's `adapter:` that the new one does not have are left out; a field that was typed
    on the command line never is.

    Raises:
        InputErrors: everything that is wrong with any of the combinations, by its name.
    """
    fields = [axis.field for axis in axes]
    for index, field in enumerate(fields):
        if field in fields[:index]:
            raise InputError(
                "is swept twice", field=f"--sweep {printable(field)}", fix="list all its values in one place"
            )
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > MAX_RUNS:
        raise InputError(f"{count:,} runs", field="--sweep", allowed=f"at most {MAX_RUNS:,}")
    folder = _output_dir(path, overrides) / SWEEP
    problems, combinations = [], []
    names: dict[str, int] = {}
    for values in itertools.product(*(axis.values for axis in axes)):
        settings = dict(zip(fields, values, strict=True))
        name = _name(settings)
        names[name] = names.get(name, 0) + 1
        name = name if names[name] == 1 else f"{name}-{names[name]}"
        try:
            combinations.append(_combination(path, overrides, settings, name, folder))
        except InputError as error:
            found = error.problems if isinstance(error, InputErrors) else [error]
            problems += [_of_run(settings, item) for item in found]
    problems = problems or list(_twins(combinations))
    if problems:
        raise InputErrors(problems)
    return Grid(folder, combinations)


def _output_dir(path: Path, overrides: Sequence[str]) -> Path:
    root = read_tree(path, overrides)
    named = root.nearest(("training", "output_dir")).value
    return Path(named if isinstance(named, str) else build(root).training.output_dir)


def _combination(
    path: Path, overrides: Sequence[str], settings: dict[str, str], name: str, folder: Path
) -> Combination:
    typed = [f"{field}={value}" for field, value in settings.items()]
    if settings.get(METHOD) in LORA_WITH:
        typed[list(settings).index(METHOD)] = f"{METHOD}=lora"
        typed.append(LORA_WITH[settings[METHOD]])
    own_folder = f"training.output_dir={json.dumps(str(folder / name))}"
    root = read_tree(path, [*overrides, *typed, own_folder])
    left_out = _leave_out(root, read_tree(path, overrides)) if METHOD in settings else ()
    return Combination(name, settings, left_out, build(root))


def _leave_out(root: Node, before: Node) -> tuple[str, ...]:
    """Take out of `root` what the recipe's file says about its own method, and the swept one does not know."""
    adapter = root.child("adapter")
    own, new = _fields(before), _fields(root)
    if adapter is None or not isinstance(adapter.value, dict) or new is None or own is None:
        return ()
    foreign = [name for name, node in adapter.value.items() if node.origin.file and name in own and name not in new]
    for name in foreign:
        del adapter.value[name]
    return tuple(foreign)


def _fields(root: Node) -> set[str] | None:
    """The fields of a recipe's method; None if it names none that we know."""
    node = root.nearest(METHOD.split("."))
    method = node.value.lower() if isinstance(node.value, str) else ""
    if method not in method_names():
        return set() if method == "full" else None
    return set(settable(config_class(method.upper())))


def _name(settings: dict[str, str]) -> str:
    """`method-dora_learning_rate-1e-4`; a long one is cut, with a digest of what it stands for."""
    short = [field.rpartition(".")[2] for field in settings]
    fields = short if len(set(short)) == len(short) else list(settings)
    parts = [
        f"{field}-{_UNSAFE.sub('-', value).strip('-.')}" for field, value in zip(fields, settings.values(), strict=True)
    ]
    name = "_".join(parts)
    if len(name) <= MAX_NAME:
        return name
    return f"{name[: MAX_NAME - 9]}-{blake2b(repr(settings).encode(), digest_size=4).hexdigest()}"


def _seed_of_split(recipe: Recipe) -> int | None:
    """The seed that decides which samples are held out, if any does."""
    return recipe.training.seed if isinstance(recipe.data.eval, EvalSplit) else None


def _of_run(settings: dict[str, str], error: InputError) -> InputError:
    run = " ".join(f"{field}={value}" for field, value in settings.items())
    fix = None
    if METHOD in settings and any(text in error.problem for text in ("has no such field", "must be given")):
        method = settings[METHOD]
        fix = f"give methods their own fields as whole sections: --sweep 'adapter={{method: {method}, ...}},{{method: ...}}'"
    place = ": ".join(str(part) for part in (f"run {run}", error.place) if part)
    return error.at(place=place, fix=fix)


def _twins(combinations: Sequence[Combination]) -> Iterator[InputError]:
    """Runs that are the same, written differently."""
    seen: dict[str, Combination] = {}
    for one in combinations:
        training = one.recipe.training.model_copy(update={"output_dir": ""})
        other = seen.setdefault(dump_recipe(one.recipe.model_copy(update={"training": training})), one)
        if other is not one:
            yield InputError(f"is the same run as {other.name}", field="--sweep", place=f"run {one.name}")
