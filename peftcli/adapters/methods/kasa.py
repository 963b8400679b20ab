"""KaSA: dW = s B diag(d) A - (the r smallest singular parts of W): they are taken for noise, and the adapter learns in
their place (Wang et al. 2024, arXiv 2412.06071).

PEFT takes them out of the base itself, for good. Here they are part of the update, so the base stays as it was, and an
adapter that is switched off leaves no trace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftcli.adapters.base import Adapter, Tensors, TensorSpec
from peftcli.adapters.methods.lora import Lora
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Kasa(Lora):
    """LoRA with singular values, on a base without its smallest ones."""

    kinds = frozenset({"linear"})

    def tensors(self) -> dict[str, TensorSpec]:
        out_features, in_features = self.shape.matrix
        if self.r >= min(out_features, in_features):
            raise InputError(
                f"KaSA requires `r` ({self.r}) to be smaller than min(in_features, out_features) "
                f"({min(out_features, in_features)}): nothing of the base would be left",
                place=self.shape.name,
                field="r",
            )
        return {
            **super().tensors(),
            "lora_diag": TensorSpec((self.r,), "normal"),
            "lora_noise_A": TensorSpec((self.r, in_features), trainable=False, saved=False),
            "lora_noise_B": TensorSpec((out_features, self.r), trainable=False, saved=False),
        }

    def initialize(self, p: Tensors) -> Tensor | None:
        self.regenerate(p)
        return super().initialize(p)

    def regenerate(self, p: Tensors) -> Tensor | None:
        u, s, vh = torch.linalg.svd(self.weight().float(), full_matrices=False)
        p.lora_noise_A.copy_(vh[-self.r :])
        p.lora_noise_B.copy_(u[:, -self.r :] * s[-self.r :])
        return None

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        a, b = super().factors(p)
        return torch.cat([a, p.lora_noise_A]), torch.cat([b * p.lora_diag, -p.lora_noise_B], dim=1)

    @classmethod
    def regularization(cls, sites: list[tuple[Adapter, Tensors]], config: Any) -> Tensor | None:
        """beta |d|^2 + gamma (|B^T B - I| + |A A^T - I|) of every module, equations 9 to 11 of the paper."""
        settings = config.kasa_config
        terms = []
        for _, p in sites:
            one = torch.eye(len(p.lora_diag), device=p.lora_diag.device)
            a, b = p.lora_A.float(), p.lora_B.float()
            skew = torch.linalg.norm(a @ a.T - one) + torch.linalg.norm(b.T @ b - one)
            terms.append(settings.beta * (p.lora_diag.float() ** 2).sum() + settings.gamma * skew)
        return torch.stack(terms).sum()
