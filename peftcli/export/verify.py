"""`--verify`: what was written is loaded as a user would load it, and its logits are compared with base + adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.adapters.base_facts import BaseFacts, read_base
from peftcli.adapters.config import AUTO_CLASSES, PeftConfig, read_config
from peftcli.errors import InputError, RunError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

TEXT = (
    "The ferry to the island leaves at half past seven. When the harbour bell rang, Marta was still counting the crates: "
    "def total(crates): return sum(crate.weight for crate in crates). Nobody had told her that 48 of 1,250 were empty."
)
"""Prose, code and numbers: real text, since random tokens hardly use what a model has learnt."""
MAX_TOKENS = 64
PLACES = ("max_position_embeddings", "n_positions")
"""What configs call the longest sequence."""

ROUTED = ("POLY", "MULTITASK_PROMPT_TUNING")
"""Methods that ask which task a row is of; the first is compared."""

BOUNDS = {"torch.float32": 1e-3, "torch.float16": 1e-2, "torch.bfloat16": 5e-2}
"""Largest difference allowed, as a share of the largest logit: weights are rounded once more to the model's dtype."""


@dataclass(frozen=True)
class Verdict:
    """How far apart two models are.

    Attributes:
        difference: largest |difference| of a logit.
        largest: the largest |logit|.
        bound: the difference that is allowed; None where the export is no exact one.
        tokens: how many positions were compared.
    """

    difference: float
    largest: float
    bound: float | None
    tokens: int


def verify(
    base: Path,
    adapters: Sequence[Path],
    result: Path,
    *,
    is_model: bool,
    is_exact: bool,
    other_dtype: str | None = None,
) -> Verdict:
    """Compare base + adapters with what was exported.

    Args:
        base: the base model's folder.
        adapters: the adapters that were exported.
        result: the folder that was written.
        is_model: whether it is a whole model, else an adapter.
        is_exact: whether it should compute the same.
        other_dtype: the dtype the model was written in, if not the base's.

    Raises:
        RunError: if it should and does not.
    """
    config = read_config(adapters[0] / "adapter_config.json")
    facts = read_base(base)
    inputs = _inputs(base, facts, config)
    expected, dtype = _adapted(base, adapters, config, inputs)
    if is_model:
        found = _logits(_load(result, config), inputs)
    else:
        found, _ = _adapted(base, [result], config, inputs)
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    share = max(BOUNDS.get(dtype, 5e-2), BOUNDS.get(f"torch.{other_dtype}", 0.0))
    bound = share * largest if is_exact else None
    if bound is not None and not difference <= bound:
        raise RunError(
            f"{result}: does not compute what base and adapter do: logits differ by {difference:.3g}, "
            f"above the bound of {bound:.3g} ({share:g} of the largest logit)"
        )
    return Verdict(difference, largest, bound, int(inputs["input_ids"].numel()))


def _inputs(base: Path, facts: BaseFacts, config: PeftConfig) -> dict[str, Tensor]:
    """Token ids of the text, or without a tokenizer some ids: as many as base and virtual tokens have places for."""
    places = next((facts.language_config[name] for name in PLACES if facts.language_config.get(name)), None)
    count = min(MAX_TOKENS, (places or 2 * MAX_TOKENS) - (getattr(config, "num_virtual_tokens", None) or 0))
    if (base / "tokenizer_config.json").exists():
        from peftcli.training.tokenizer import read_tokenizer

        ids = read_tokenizer(facts)(TEXT, return_tensors="pt")["input_ids"][:, :count]
    else:
        size = facts.language_config.get("vocab_size", 32)
        ids = torch.randint(0, size, (1, count), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids}
    if facts.config.get("is_encoder_decoder"):
        inputs["decoder_input_ids"] = ids
    if config.peft_type in ROUTED:
        inputs["task_ids"] = torch.zeros(1, dtype=torch.long)
    return inputs


def _adapted(base: Path, adapters: Sequence[Path], config: PeftConfig, inputs: dict[str, Tensor]) -> tuple[Tensor, str]:
    """Logits of base + adapters (several are added one on top of the other), and the base's dtype."""
    from peftcli import PeftModel

    model = _load(base, config)
    dtype = str(model.dtype)
    rows = _rows(adapters[0])
    if rows is not None and rows != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows)
    adapted = PeftModel.from_pretrained(model, adapters[0], allow_pickle=True)
    for index, folder in enumerate(adapters[1:], start=1):
        adapted.load_adapter(folder, str(f"adapter_{index}"), allow_pickle=True)
    if len(adapters) > 1:
        adapted.attached.set_active(list(adapted.peft_config)[::-1])
    return _logits(adapted, inputs), dtype


def _rows(adapter: Path) -> int | None:
    """Rows of the embedding an adapter stores, if it does."""
    from peftcli.merging.source import Source

    ends = (".embed_tokens.weight", ".wte.weight", ".word_embeddings.weight")
    return next((info.shape[0] for name, info in Source(adapter).copies.items() if name.endswith(ends)), None)


def _load(folder: Path, config: PeftConfig) -> Any:
    import transformers

    from peftcli.training.quiet import quiet_transformers

    if config.task is None:
        raise InputError("has no task_type, so it is not known how to load its base", field="task_type")
    with quiet_transformers():
        return getattr(transformers, AUTO_CLASSES[config.task]).from_pretrained(folder, dtype="auto").eval()


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    logits = output.logits if "logits" in output else output[0]
    return logits.float()
