"""The model card PEFT writes beside a saved adapter (`README.md`): what a hub needs to know, and the versions it was made with.

`peft train` writes its own, fuller one (`training/card.py`).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch  # noqa: TID253

from peftcli.files import write_atomically

FRAMEWORKS = "### Framework versions"
PROCEDURE = "## Training procedure"
QUANTIZED = "The following `bitsandbytes` quantization config was used during training:"
PIPELINES = {"CAUSAL_LM": "text-generation"}


def update_card(path: Path, model: Any) -> None:
    """Write a card, or bring the one that is there up to date; its text and other metadata are kept.

    Args:
        path: the card.
        model: a PeftModel.
    """
    import yaml
    from huggingface_hub import ModelCard

    text = path.read_text(encoding="utf-8") if path.exists() else f"# {model.peft_type} adapter\n"
    try:
        card = ModelCard(text if text.startswith("---") else f"---\nlibrary_name: peft\n---\n\n{text}")
    except (ValueError, yaml.YAMLError):
        warnings.warn(f"{path}: its metadata are no YAML, so the card is left as it is", stacklevel=4)
        return
    _describe(card.data, model)
    lines = card.text.splitlines()
    _add_quantization(lines, model)
    _add_version(lines)
    card.text = "\n".join(lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, str(card).encode())


def _describe(data: Any, model: Any) -> None:
    """The metadata: library, base, tags, pipeline. A base's path says nothing of the machine."""
    from transformers import PreTrainedModel

    from peftcli.merging.report import base_label

    config = model.active_peft_config
    tags = {config.peft_type.lower(), "peftcli", *(getattr(model.get_base_model(), "model_tags", None) or [])}
    if isinstance(model.get_base_model(), PreTrainedModel):
        tags.add("transformers")
    if config.base_model_name_or_path:
        data["base_model"] = base_label(config.base_model_name_or_path)
        tags.add(f"base_model:adapter:{data['base_model']}")
    data["library_name"] = "peft"
    data["tags"] = sorted({*tags, *(data.get("tags") or [])})
    if not data.get("pipeline_tag") and config.task in PIPELINES:
        data["pipeline_tag"] = PIPELINES[config.task]


def _add_quantization(lines: list[str], model: Any) -> None:
    """How the base was quantised, once."""
    settings = getattr(getattr(model.get_base_model(), "config", None), "quantization_config", None)
    if settings is None or QUANTIZED in lines:
        return
    values = settings if isinstance(settings, dict) else settings.to_dict()
    block = ["", QUANTIZED, *(f"- {name}: {value}" for name, value in values.items()), ""]
    if PROCEDURE not in lines:
        lines += ["", PROCEDURE, ""]
    at = lines.index(PROCEDURE) + 1
    lines[at:at] = block


def _add_version(lines: list[str]) -> None:
    """The versions, each once."""
    from peftcli import __version__

    if FRAMEWORKS not in lines:
        lines += ["", FRAMEWORKS, ""]
    new = [line for line in (f"- peftcli {__version__}", f"- PyTorch {torch.__version__}") if line not in lines]
    at = lines.index(FRAMEWORKS) + 2
    lines[at:at] = new
