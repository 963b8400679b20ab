"""PiSSA: start from the r largest singular directions of the weight (Meng et al. 2024, arXiv 2404.02948)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

OVERSAMPLING = 8  # extra directions a randomised SVD looks at (Halko et al. 2011, 0909.4061, section 4.3)


def pissa(weight: Tensor, r: int, scaling: float, iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """A0 = sqrt(S / s) V^T [r, in], B0 = U sqrt(S / s) [out, r] of W = U S V^T.

    Args:
        weight: [out, in], float32.
        r: rank.
        scaling: LoRA's s.
        iterations: power iterations of a randomised SVD (`pissa_niter_<n>`); None computes the SVD in full.
    """
    if iterations is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :r], s[:r], vh[:r]
    else:
        u, s, v = torch.svd_lowrank(weight, min(r + OVERSAMPLING, *weight.shape), niter=iterations)
        u, s, vh = u[:, :r], s[:r], v[:, :r].T
    root = (s / scaling).sqrt()
    return root[:, None] * vh, u * root
