"""MonteCLoRA: in training A is a mean of samples around it, whose spread and weights are learnt as well
(Seth et al. 2024, arXiv 2411.04358). Evaluated and merged it is LoRA.

A' = A + c sum_k w_k Z_k diag(v)^1/2 with normal Z_k, v = e^(2 std) times a chi-square number, and weights w drawn near a
Dirichlet distribution's. A weighted sum of normal samples is normal itself: one sample, scaled by |w|, stands for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftcli.adapters.base import Adapter, Tensors, TensorSpec
from peftcli.adapters.methods.lora import Lora
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

SAMPLER = "lora_monteclora_sampler."
LEAST = 1e-6


class Monteclora(Lora):
    """LoRA whose A is sampled in training."""

    kinds = frozenset({"linear"})

    @property
    def settings(self) -> Any:
        """MontecloraConfig."""
        return self.config.monteclora_config

    @property
    def drops(self) -> bool:
        return True

    def tensors(self) -> dict[str, TensorSpec]:
        r, samples = self.r, self.settings.num_samples
        return {
            **super().tensors(),
            f"{SAMPLER}std_prior": TensorSpec((r,)),
            f"{SAMPLER}expert_weights_prior": TensorSpec((samples,)),
            f"{SAMPLER}gaussian_var_prior": TensorSpec((r, r), trainable=False),
            f"{SAMPLER}expert_weights": TensorSpec((samples,), trainable=False),
        }

    def initialize(self, p: Tensors) -> Tensor | None:
        for name in ("std_prior", "expert_weights_prior"):
            p[SAMPLER + name].uniform_()
        p[f"{SAMPLER}gaussian_var_prior"].copy_(torch.eye(self.r))
        p[f"{SAMPLER}expert_weights"].fill_(1 / self.settings.num_samples)
        return super().initialize(p)

    def dropped(self, p: Tensors) -> Tensors:
        std = p[f"{SAMPLER}std_prior"]
        # The diagonal of a Wishart matrix with r degrees of freedom is all that is used of one.
        chi_square = torch.randn(self.r, self.r, dtype=std.dtype, device=std.device).square().sum(0)
        variance = ((2 * std).exp() * chi_square).clamp_min(1e-3)
        weights = self._weights(p[f"{SAMPLER}expert_weights_prior"].exp().clamp_min(LEAST))
        with torch.no_grad():
            p[f"{SAMPLER}gaussian_var_prior"].copy_(torch.diag(variance))
            p[f"{SAMPLER}expert_weights"].copy_(weights)
        noise = torch.randn_like(p.lora_A) * (variance.sqrt() * weights.norm())[:, None]
        return Tensors({**p, "lora_A.weight": p.lora_A + self.settings.sample_scaler * noise})

    @staticmethod
    def _weights(alpha: Tensor) -> Tensor:
        """Weights that sum to 1, drawn from the softmax-normal distribution that is near Dirichlet(alpha)."""
        count = len(alpha)
        variance = (1 - 2 / count) / alpha + (1 / alpha).sum() / count**2
        spread = (variance.clamp_min(LEAST) + LEAST).sqrt()
        mean = alpha.log() - alpha.log().mean()
        return (mean + spread * torch.randn_like(alpha)).softmax(0)

    @classmethod
    def regularization(cls, sites: list[tuple[Adapter, Tensors]], config: Any) -> Tensor | None:
        """The mean over modules of the divergences from the priors, and of the weights' concentration."""
        settings = config.monteclora_config
        terms = []
        for _, p in sites:
            std, alpha = p[f"{SAMPLER}std_prior"], p[f"{SAMPLER}expert_weights_prior"].exp()
            r = len(std)
            sampled = p[f"{SAMPLER}gaussian_var_prior"].diagonal() * (2 * (std - std.detach())).exp()
            wishart = 0.5 * r * ((2 * std).exp().sum() - 2 * std.sum() - r)
            normal = 0.5 * len(alpha) * (sampled.sum() - sampled.clamp_min(LEAST).log().sum() - r)
            divergence = _dirichlet_divergence(alpha, settings.dirichlet_prior) + wishart + normal
            entropy = (p[f"{SAMPLER}expert_weights"] ** 2).sum() if settings.use_entropy else 0
            terms.append(settings.kl_loss_weight * divergence + entropy)
        return torch.stack(terms).mean()


def _dirichlet_divergence(alpha: Tensor, prior: float) -> Tensor:
    """KL(Dirichlet(alpha), Dirichlet(prior, prior, ...))."""
    fixed = torch.full_like(alpha, prior)
    constants = alpha.sum().lgamma() - alpha.lgamma().sum() - fixed.sum().lgamma() + fixed.lgamma().sum()
    return constants + ((alpha - fixed) * (alpha.digamma() - alpha.sum().digamma())).sum()
