"""aLoRA: LoRA that acts from the last occurrence of its invocation tokens on (Greenewald et al. 2025, arXiv 2504.12397).

The tokens before it are the bare base's, so their cache can be shared by any number of such adapters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftcli.adapters.base import Tensors
from peftcli.adapters.methods.lora import Lora
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import Site


class Alora(Lora):
    """B A at the tokens that come after the invocation, and at the invocation itself."""

    kinds = frozenset({"linear"})
    mergeable = False
    needs_rows = True

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        update = super().activation(p, x, site)
        return None if update is None else update * self._invoked(x.shape[:-1]).unsqueeze(-1).to(update)

    def _invoked(self, shape: torch.Size) -> Tensor:
        """Which tokens [B, T], or [B T] in one row, the adapter acts on."""
        ids, generating = self.context.input_ids, self.context.generating
        if ids is None:
            raise InputError(
                "aLoRA looks for its invocation tokens among the token ids of the batch", fix="call it with input_ids"
            )
        rows, tokens = shape if len(shape) == 2 else ids.shape
        if shape.numel() != rows * tokens or rows % len(ids) or not (tokens == ids.shape[1] or generating):
            raise InputError(
                f"aLoRA can't tell which of {list(shape)} vectors belong to which of {list(ids.shape)} tokens",
                place=self.shape.name,
                field="target_modules",
            )
        # While generating there are fewer tokens than in the prompt (the rest is cached), or more (nothing is).
        position = torch.arange(tokens, device=ids.device) + max(ids.shape[1] - tokens, 0)
        start = self._starts(ids).repeat_interleave(rows // len(ids))  # beams repeat each row
        return (position >= start.unsqueeze(1)).reshape(shape)

    def _starts(self, ids: Tensor) -> Tensor:
        """Where the last occurrence of the invocation begins in each row [B]; past every token where there is none."""
        sequence = torch.tensor(self.config.alora_invocation_tokens, device=ids.device)
        last = ids.shape[1] - len(sequence)
        never = torch.full((len(ids),), torch.iinfo(torch.int64).max, device=ids.device)
        if last < 0:
            return never
        found = (ids.unfold(1, len(sequence), 1) == sequence).all(-1)
        return torch.where(found.any(1), last - found.flip(1).int().argmax(1), never)
