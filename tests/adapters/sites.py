"""Tiny models, one for each kind of module an adapter can sit on. The adapted module is called `site`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D


class Net(nn.Module):
    """input -> site -> tanh, optionally recomputed in the backward pass."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.site = site
        self.checkpointing: bool | None = None
        """None: no recomputation; else `use_reentrant`."""

    def block(self, x: Tensor) -> Tensor:
        y = self.site(x, x, x)[0] if isinstance(attention_inside(self.site), nn.MultiheadAttention) else self.site(x)
        return torch.tanh(y)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing is None:
            return self.block(x)
        if x.is_floating_point():
            x = x.requires_grad_()
        return checkpoint(self.block, x, use_reentrant=self.checkpointing)


def attention_inside(module: nn.Module) -> nn.Module:
    return getattr(module, "base_layer", module)


@dataclass(frozen=True)
class SiteCase:
    """How to build a module and an input for it."""

    name: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]

    def __str__(self) -> str:
        return self.name


def _images(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(3, *shape)


SITES = [
    SiteCase("linear", "linear", lambda: nn.Linear(24, 16), _images(5, 24)),
    SiteCase("linear_no_bias", "linear", lambda: nn.Linear(16, 24, bias=False), _images(16)),
    SiteCase("gpt2_conv1d", "linear", lambda: Conv1D(16, 24), _images(5, 24)),
    SiteCase("conv1d", "conv", lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1), _images(8, 9)),
    SiteCase(
        "conv2d_rectangular",
        "conv",
        lambda: nn.Conv2d(8, 12, (3, 1), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        _images(8, 7, 6),
    ),
    SiteCase("conv2d_dilated", "conv", lambda: nn.Conv2d(8, 12, 3, dilation=2, padding=2), _images(8, 7, 7)),
    SiteCase(
        "conv2d_reflect", "conv", lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), _images(8, 6, 6)
    ),
    SiteCase("conv2d_grouped", "conv", lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1), _images(8, 6, 6)),
    SiteCase("conv3d", "conv", lambda: nn.Conv3d(4, 8, (1, 2, 2), bias=False), _images(4, 3, 4, 4)),
    SiteCase("embedding", "embedding", lambda: nn.Embedding(32, 16), lambda: torch.randint(0, 32, (3, 5))),
    SiteCase("attention", "attention", lambda: nn.MultiheadAttention(16, 2, batch_first=True), _images(5, 16)),
    SiteCase("layer_norm", "module", lambda: nn.LayerNorm(16), _images(5, 16)),
    SiteCase("block", "module", lambda: nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8)), _images(16)),
]
