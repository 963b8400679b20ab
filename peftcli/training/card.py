"""The model card, `README.md` beside a finished adapter: base, method, data, metrics, how to load it.

Names in it come from files of others. They are escaped, so that none can add a YAML key, markup or a link.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from peftcli import __version__
from peftcli.adapters.config import AUTO_CLASSES, TaskType
from peftcli.errors import printable
from peftcli.recipe.redact import redact

if TYPE_CHECKING:
    from peftcli.recipe.schema import QuantizationSection, Recipe

_HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_PIPELINES = {
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_MOST_CLASSES = 64


def model_card(recipe: Recipe, data: Mapping[str, Any], metrics: Mapping[str, float] | None, step: int) -> str:
    """The card's text. Equal runs give equal text: no dates, no speeds.

    Args:
        recipe: what was run.
        data: `data/audit.json`.
        metrics: the evaluation of the saved step, if there was one.
        step: the saved step.
    """
    base = base_name(recipe)
    parts = [
        _front_matter(recipe, base),
        f"# {_text(PurePath(recipe.training.output_dir).name)}\n",
        f"{_method(recipe)} on {_code(base)}, trained with peftcli.\n",
        "## Training\n",
        _table(_training_facts(recipe, data, step)),
    ]
    if metrics:
        parts += [
            "## Evaluation\n",
            _table({name.removeprefix("eval_").replace("_", " "): f"{v:.4f}" for name, v in metrics.items()}),
        ]
    parts += ["## Use\n", _usage(recipe, base), f"### Framework versions\n\n- peftcli {__version__}\n"]
    return redact("\n".join(parts))


def base_name(recipe: Recipe) -> str:
    """The base as a card may name it: a hub name, or the last part of a path, which says nothing of the machine."""
    name = recipe.model.name_or_path
    return name if _HUB_NAME.fullmatch(name) else PurePath(name.replace("\\", "/")).name


def _front_matter(recipe: Recipe, base: str) -> str:
    full = recipe.adapter.config is None
    values: dict[str, Any] = {
        "library_name": "transformers" if full else "peft",
        "base_model": base,
        "pipeline_tag": _PIPELINES.get(recipe.model.task_type, "text-generation"),
        "tags": [recipe.adapter.method, "peftcli", *([] if full else [f"base_model:adapter:{base}"])],
    }
    # JSON is YAML: quoted this way, no value can end its line or start a key.
    lines = [
        f"{name}: {json.dumps(redact(value) if isinstance(value, str) else value)}" for name, value in values.items()
    ]
    return "\n".join(["---", *lines, "---", ""])


def _method(recipe: Recipe) -> str:
    return "All weights" if recipe.adapter.config is None else f"{recipe.adapter.method.upper()} adapter"


def _training_facts(recipe: Recipe, data: Mapping[str, Any], step: int) -> dict[str, str]:
    training, train = recipe.training, data["train"]
    facts = {
        "data": ", ".join(_code(PurePath(source["path"]).name) for source in train["sources"]),
        "samples": f"{train['samples']:,}",
        "tokens": f"{train['tokens']:,}",
        "supervised tokens": f"{train['supervised_tokens']:,}",
        "saved step": str(step),
        "learning rate": f"{training.learning_rate:g}, {training.lr_scheduler_type}",
        "batch": f"{training.per_device_train_batch_size} x {training.gradient_accumulation_steps} accumulated",
        "optimizer": training.optim,
        "seed": str(training.seed),
    }
    if (labels := recipe.model.labels) is not None:
        shown = ", ".join(_code(name) for name in labels[:_MOST_CLASSES])
        facts["classes"] = f"{len(labels)}: {shown}" + ", ..." * (len(labels) > _MOST_CLASSES)
    if recipe.preference is not None:
        facts["preference"] = f"{recipe.preference.loss}, beta {recipe.preference.beta:g}"
    if recipe.quantization is not None:
        facts["base in"] = _quantization(recipe.quantization)
    config = recipe.adapter.config
    for name in ("r", "lora_alpha"):
        if hasattr(config, name):
            facts[name] = str(getattr(config, name))
    return facts


def _quantization(section: QuantizationSection) -> str:
    if section.load_in_8bit:
        return "8 bits (LLM.int8)"
    double = ", double quantised" if section.bnb_4bit_use_double_quant else ""
    return f"4 bits ({section.bnb_4bit_quant_type}{double}), computed in {section.bnb_4bit_compute_dtype}"


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""])


def _usage(recipe: Recipe, base: str) -> str:
    literal, auto = json.dumps(base), AUTO_CLASSES[TaskType(recipe.model.task_type)]  # JSON's strings are Python's
    classes = f", num_labels={len(recipe.model.labels)}" if recipe.model.labels else ""
    if recipe.adapter.config is None:
        return (
            f"```python\nfrom transformers import {auto}\n\n"
            f'model = {auto}.from_pretrained("path/to/this/folder")\n```\n'
        )
    return (
        "With `peft`, or `peftcli` in its place:\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        f"from transformers import {auto}\n\n"
        f"base = {auto}.from_pretrained({literal}{classes})\n"
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")\n'
        "```\n\n"
        "On the command line: `peft inspect path/to/this/folder`, `peft eval path/to/this/folder --data FILE`.\n"
    )


def _text(text: str) -> str:
    """`text` on one line, with nothing that Markdown or HTML reads as markup."""
    line = " ".join(printable(text).split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", line)


def _code(text: str) -> str:
    """`text` as a code span, in which Markdown reads nothing; a bar would end a table's cell."""
    return "`" + " ".join(printable(text).split()).replace("`", "'").replace("|", "/") + "`"
