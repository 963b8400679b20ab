"""OLoRA: start from the leading part of the weight's QR decomposition (Büyükakyüz 2024, arXiv 2406.01775)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def olora(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A0 = R[:r] [r, in], B0 = Q[:, :r] [out, r] of W = Q R. As in the paper and PEFT, s is not divided out.

    Args:
        weight: [out, in], float32.
        r: rank.
        scaling: LoRA's s; the part taken from the base is s B0 A0.
    """
    q, upper = torch.linalg.qr(weight)
    return upper[:r].contiguous(), q[:, :r].contiguous()
