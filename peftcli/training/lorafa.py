"""LoRA-FA: A stays as it began, and B takes the step that full fine-tuning would like best (Zhang et al., 2308.03303).

With A frozen, its activations need not be kept. B's gradient g becomes g (A A^T)^-1 / s^2: the least-squares step towards
the gradient of the full weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.errors import InputError

RIDGE = 1e-8  # keeps A A^T invertible, as in PEFT


class LoraFA(torch.optim.AdamW):
    """AdamW on B matrices whose gradients are preconditioned by their frozen A.

    Args:
        pairs: (A [r, in], B [out, r]) of every adapted module.
        others: what else is trained (heads, biases).
        scaling: LoRA's s.
        options: AdamW's.
    """

    def __init__(
        self, pairs: list[tuple[Tensor, Tensor]], others: list[Tensor], scaling: float, **options: Any
    ) -> None:
        super().__init__([{"params": group} for group in ([b for _, b in pairs], others) if group], **options)
        self._pairs, self._scaling = pairs, scaling

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Precondition, then AdamW's step."""
        for a, b in self._pairs:
            if b.grad is not None:
                square = a.float() @ a.float().T + RIDGE * torch.eye(len(a), device=a.device)
                b.grad = (b.grad.float() @ torch.linalg.pinv(square) / self._scaling**2).to(b.dtype)
        return super().step(closure)


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool = False
) -> LoraFA:
    """Freeze every A of a model with LoRA on linear layers, and make the optimizer that trains its B.

    Raises:
        InputError: if the model has no LoRA matrices.
    """
    named = dict(model.named_parameters())
    pairs: list[tuple[Tensor, Tensor]] = []
    paired: set[int] = set()
    for name, b in named.items():
        a = named.get(name.replace(".lora_B.", ".lora_A."))
        if ".lora_B." in name and name.endswith(".weight") and a is not None and a.dim() == 2:
            a.requires_grad_(False)
            pairs.append((a, b))
            paired |= {id(a), id(b)}
    if not pairs:
        raise InputError("LoRA-FA needs LoRA matrices, and this model has none")
    others: list[Tensor] = [p for p in named.values() if p.requires_grad and id(p) not in paired]
    scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
    return LoraFA(pairs, others, scaling, lr=lr, weight_decay=weight_decay)
