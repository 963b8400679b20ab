"""VeLoRA: LoRA that keeps, for the gradient of A, a few numbers of each input instead of the input
(Miles et al. 2024, arXiv 2405.17991). Evaluated and merged it is LoRA.

The features are split into groups, each is projected on one direction v that all share, and the backward pass rebuilds
x' = s (x v) v^T from that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftcli.adapters.base import Tensors, TensorSpec
from peftcli.adapters.methods.lora import Lora
from peftcli.lazy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import Site


class Velora(Lora):
    """LoRA with compressed inputs in training."""

    kinds = frozenset({"linear"})

    @property
    def settings(self) -> Any:
        """VeloraConfig."""
        return self.config.velora_config

    def tensors(self) -> dict[str, TensorSpec]:
        size = -(-self.shape.in_features // self.settings.num_groups)
        return {**super().tensors(), "lora_velora_embed": TensorSpec((size,), "zeros", trainable=False)}

    def initialize(self, p: Tensors) -> Tensor | None:
        if self.settings.init_type == "random":
            p.lora_velora_embed.copy_(functional.normalize(torch.randn_like(p.lora_velora_embed), dim=0))
        return super().initialize(p)

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        if not (self.training and torch.is_grad_enabled()):
            return super().activation(p, x, site)
        a, b = (factor.to(x.dtype) for factor in self.factors(p))
        groups = functional.pad(x.detach(), (0, -x.shape[-1] % len(p.lora_velora_embed)))
        groups = groups.unflatten(-1, (-1, len(p.lora_velora_embed)))
        self._follow(p.lora_velora_embed, groups)
        direction = p.lora_velora_embed.to(x.dtype, copy=True)  # later batches change it in place
        seen = torch.utils.checkpoint.checkpoint(self._rebuilt, groups @ direction, direction, a, use_reentrant=False)
        # A x, whose gradient reaches x through the frozen A and A through what was rebuilt of x.
        hidden = functional.linear(x, a.detach()) + (seen - seen.detach())
        return functional.linear(hidden, b)

    def _follow(self, embed: Tensor, groups: Tensor) -> None:
        """Turn the direction to the mean of this batch, where the settings say so."""
        how = self.settings.init_type
        if how == "batch_average" or (how == "batch_average_once" and not embed.any()):
            mean = groups.flatten(0, -2).float().mean(0)
            embed.copy_(functional.normalize(mean if mean.any() else torch.ones_like(mean), dim=0))

    def _rebuilt(self, compressed: Tensor, direction: Tensor, a: Tensor) -> Tensor:
        """A x' for the x' [..., in] that `compressed` [..., groups] stands for."""
        x = (compressed.unsqueeze(-1) * direction).flatten(-2)[..., : a.shape[1]]
        return functional.linear(x * self.settings.scale, a)
