"""DoRA: W' = m / |W + dW| (W + dW), a trained magnitude m [out] and LoRA's direction (Liu et al. 2024, 2402.09353).

The norm of each row is a constant to the gradient, as in the paper's section 4.3. It is computed without W + dW:
|W + B A|^2 = |W|^2 + 2 <W A^T, B> + |A^T B|^2, whose largest product is [out, r].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftcli.adapters.base import Tensors, TensorSpec
from peftcli.adapters.methods.lora import Lora
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import Site


class Dora(Lora):
    """LoRA with a magnitude."""

    def tensors(self) -> dict[str, TensorSpec]:
        shape = self.shape
        magnitude = (
            (1, shape.out_features, *(1,) * len(shape.kernel)) if shape.kind == "conv" else (shape.out_features,)
        )
        spec = TensorSpec(magnitude, live="lora_magnitude_vector.weight")
        return {**super().tensors(), "lora_magnitude_vector": spec}

    def initialize(self, p: Tensors) -> Tensor | None:
        changed = super().initialize(p)
        weight = self.weight() if changed is None else changed
        p.lora_magnitude_vector.copy_(self.norm(p, weight).reshape(p.lora_magnitude_vector.shape))
        return changed

    def norm(self, p: Tensors, weight: Tensor) -> Tensor:
        """|W + dW| of each row [out], without a gradient."""
        with torch.no_grad():
            a, b = self.factors(p)
            crossed = (weight @ a.T.to(weight.dtype)).to(a.dtype)
            square = (
                torch.linalg.vector_norm(weight, dim=1, dtype=a.dtype) ** 2
                + 2 * (crossed * b).sum(1)
                + ((b @ (a @ a.T)) * b).sum(1)
            )
            return square.clamp_min(0).sqrt()

    def gain(self, p: Tensors, weight: Tensor) -> Tensor:
        """m / |W + dW| [out]."""
        return p.lora_magnitude_vector.flatten() / self.norm(p, weight)

    def delta(self, p: Tensors) -> Tensor:
        weight = self.weight()
        update = super().delta(p)
        gain = self.gain(p, weight)[:, None]
        return (gain - 1) * weight.to(update.dtype) + gain * update

    def with_module(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        return None if self.config.lora_bias else site.with_update(x, *self.factors(p), self.gain(p, self.weight()))

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        gain = site.broadcast(self.gain(p, self.weight()))
        update = super().activation(p, x, site)
        assert update is not None
        return (gain - 1).to(update.dtype) * site.project(x) + gain.to(update.dtype) * update
