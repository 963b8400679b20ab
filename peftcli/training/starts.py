"""Adapters whose start comes from data (EVA, CorDA, LoRA-GA): a short pass over the training set before they are attached."""

from __future__ import annotations

from typing import Any

import torch  # noqa: TID253
from torch import nn  # noqa: TID253

from peftcli.adapters.config import PeftConfig
from peftcli.adapters.initializers.corda import preprocess_corda
from peftcli.adapters.initializers.eva import eva_start
from peftcli.adapters.initializers.lora_ga import preprocess_loraga
from peftcli.adapters.methods.lora import LoraConfig
from peftcli.data.tokens import TokenDataset
from peftcli.recipe.training_section import TrainingSection
from peftcli.training.batches import to_batch, training_windows

BATCHES = 32
"""How many batches are looked at: EVA and CorDA settle within a few hundred samples, LoRA-GA's paper takes fewer."""


def start_from_data(
    base: nn.Module,
    config: PeftConfig,
    dataset: TokenDataset,
    settings: TrainingSection,
    pad_token_id: int,
    device: torch.device,
) -> PeftConfig:
    """The config with its start prepared, where it asks for one from data; as it is otherwise.

    Every process looks at the same batches, so that all begin with the same adapter.
    """
    how = config.init_lora_weights if isinstance(config, LoraConfig) else None
    if how not in ("eva", "corda", "lora_ga") or not isinstance(config, LoraConfig):
        return config
    order = [indices for window in training_windows(dataset, settings, 0) for indices in window][:BATCHES]
    batches = [to_batch(dataset, indices, pad_token_id, device) for indices in order]
    model: Any = base

    def forward() -> None:
        for batch in batches:
            model(**{name: tensor for name, tensor in batch.items() if name != "labels"})

    def forward_backward() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    if how == "eva":
        return eva_start(base, config, batches)
    if how == "corda":
        preprocess_corda(base, config, forward)
    else:
        preprocess_loraga(base, config, forward_backward)
    return config
