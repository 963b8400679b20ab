"""One training step in this process, for looking into it: the loss, its gradients, the optimizer, nothing around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def training_step(model: Any, lengths: Sequence[int]) -> Callable[[], None]:
    """What takes a step of `model` on samples of so many tokens, all learnt but the first.

    Args:
        model: a causal language model with something to train.
        lengths: tokens of each sample; the tokens are random.
    """
    import torch

    from peftcli.training.losses import CausalLMLoss
    from peftcli.training.sparing import sparing

    shape = len(lengths), max(lengths)
    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    loss = CausalLMLoss(model.train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        with sparing(model):
            (loss(batch) / sum(lengths)).backward()
        loss.release()
        optimizer.step()
        optimizer.zero_grad()

    return step
