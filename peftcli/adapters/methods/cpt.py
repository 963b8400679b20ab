"""CPT: a prompt of given example tokens that may each move a little (Blau et al. 2024, arXiv 2410.17222).

prompt = words(ids) + delta. A row of delta stays inside a ball whose radius depends on what its token is: part of a
template, an input, or an output; outputs (type 0 modulo 4) never move. The loss here is that of the text alone: PEFT's
extra loss on the examples' outputs is left out, and its decay is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from peftcli.adapters.config import TaskType
from peftcli.adapters.prompt_base import PromptLearningConfig, PromptMethod, fixed_embedding
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

REFERENCE_WIDTH = 2048  # the radii are meant for embeddings of this many dimensions
IMMOBILE = 1e-10


@dataclass
class CPTConfig(PromptLearningConfig):
    """CPT's fields, as in PEFT.

    Attributes:
        cpt_token_ids: the example tokens.
        cpt_mask: which of them are attended to; all must be.
        cpt_tokens_type_mask: type of each: modulo 4, 1 input template, 2 input, 3 output template, 0 output.
        opt_weighted_loss_type: `none`.
        opt_loss_decay_factor: only with PEFT's `decay`.
        opt_projection_epsilon: radius for input tokens.
        opt_projection_format_epsilon: radius for template tokens.
    """

    peft_type = "CPT"

    cpt_token_ids: list[Annotated[int, Ge(0)]] | None = None
    cpt_mask: list[Annotated[int, Ge(0)]] | None = None
    cpt_tokens_type_mask: list[Annotated[int, Ge(0)]] | None = None
    opt_weighted_loss_type: Literal["none"] = "none"
    opt_loss_decay_factor: Annotated[float, Gt(0)] = 1.0
    opt_projection_epsilon: Annotated[float, Gt(0)] = 0.1
    opt_projection_format_epsilon: Annotated[float, Gt(0)] = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        count = len(self.cpt_token_ids or [0])
        self.cpt_token_ids = self.cpt_token_ids or [0]
        self.num_virtual_tokens = self.num_virtual_tokens or count
        self.cpt_mask = self.cpt_mask or [1] * count
        self.cpt_tokens_type_mask = self.cpt_tokens_type_mask or [1] * count

    def validate(self) -> None:
        super().validate()
        if self.task_type not in (None, TaskType.CAUSAL_LM):
            raise InputError("CPTConfig only supports task_type = CAUSAL_LM.", field="task_type")
        for name in ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"):
            if len(getattr(self, name)) != self.num_virtual_tokens:
                raise InputError(
                    f"has {len(getattr(self, name))} entries for {self.num_virtual_tokens} virtual tokens", field=name
                )


class Cpt(PromptMethod):
    """Example tokens, moved a little."""

    config: CPTConfig

    @property
    def is_plain(self) -> bool:
        return self.config.inference_mode

    def parts(self) -> dict[str, nn.Module | nn.Parameter | Tensor]:
        if self.is_plain:
            return super().parts()
        delta = torch.nn.Embedding(self.tokens, self.width)
        torch.nn.init.zeros_(delta.weight)
        return {"embedding": fixed_embedding(self.tokens, self.width), "delta_embedding": delta}

    def initialize(self, p: Any, words: nn.Embedding) -> None:
        if (largest := max(self.config.cpt_token_ids or [])) >= words.num_embeddings:
            raise InputError(
                f"{largest} is no token of the base", field="cpt_token_ids", allowed=f"0 to {words.num_embeddings - 1}"
            )
        p.embedding.weight.copy_(words(torch.tensor(self.config.cpt_token_ids, device=words.weight.device)))

    def prompt(self, p: Any, task_ids: Tensor | None = None) -> Tensor:
        if self.is_plain:
            return p.embedding.weight
        delta = p.delta_embedding.weight
        radius = self.radii().to(delta)
        norm = delta.detach().norm(dim=1).clamp_min(1e-30)
        inside = delta.detach() * torch.minimum(radius / norm, torch.ones_like(norm))[:, None]
        # The gradient is that of the projected point, as if the step had ended there.
        moved = delta + (inside - delta.detach())
        mobile = (radius > IMMOBILE)[:, None]
        return p.embedding.weight + torch.where(mobile, moved, inside)

    def radii(self) -> Tensor:
        """How far each token may move [tokens]."""
        unit = math.sqrt(self.width / REFERENCE_WIDTH)
        by_type = {
            1: self.config.opt_projection_format_epsilon * unit,
            2: self.config.opt_projection_epsilon * unit,
            3: self.config.opt_projection_format_epsilon * unit,
        }
        return torch.tensor([by_type.get(kind % 4, IMMOBILE) for kind in self.config.cpt_tokens_type_mask or []])
