"""Trainable tokens: some rows of an embedding are trained, the others stay (PEFT 0.15; no paper).

Rows are stored as they are, not as differences, so a file means the same on a base whose new rows were drawn anew. Where
the output head is tied to the embedding it follows. `LoraConfig.trainable_token_indices` does this beside LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge

from peftcli.adapters.base import DeltaAdapter, Tensors, TensorSpec
from peftcli.adapters.config import INPUT_EMBEDDINGS, TunerConfig, later
from peftcli.adapters.registry import Method
from peftcli.errors import InputError
from peftcli.lazy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import Site

TokenIndex = Annotated[int, Ge(0)]


@dataclass
class TrainableTokensConfig(TunerConfig):
    """Fields of trainable tokens, as in PEFT.

    Attributes:
        target_modules: embeddings, or linear layers whose rows are tokens; the model's input embedding when None.
        token_indices: the rows to train.
        init_weights: start with the base's rows; False starts at random (for tests).
        modules_to_save: modules trained in full beside the tokens. PEFT does not know it for this method.
    """

    peft_type = "TRAINABLE_TOKENS"
    prefix = "trainable_tokens_"
    absent = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})
    default_tables: ClassVar = {"target_modules": INPUT_EMBEDDINGS}
    field: ClassVar[str] = "token_indices"
    """What users call the list of tokens."""

    token_indices: list[TokenIndex] = later([], since="0.15")
    init_weights: bool = True
    modules_to_save: list[str] | None = later(None, since="no PEFT yet")

    def validate(self) -> None:
        super().validate()
        if not self.token_indices:
            raise InputError("names no token", field=self.field)
        if len(set(self.token_indices)) < len(self.token_indices):
            raise InputError("names a token twice", field=self.field)


@dataclass
class TokensBesideConfig(TrainableTokensConfig):
    """The part of an adapter of another method that trains tokens."""

    field = "trainable_token_indices"

    def adapter_variant(self) -> Method | None:
        return Method("trainable_tokens", "TokensBesideConfig", "TokensBeside")


class TrainableTokens(DeltaAdapter):
    """Rows in the places of the base's."""

    kinds = frozenset({"embedding", "linear"})
    follows_ties = True
    stored_at_ties: ClassVar[bool] = True
    config: TrainableTokensConfig
    key: ClassVar[str] = "trainable_tokens_delta"
    live: ClassVar[str | None] = None

    @property
    def is_embedding(self) -> bool:
        return self.shape.kind == "embedding"

    def tensors(self) -> dict[str, TensorSpec]:
        tokens, size = self.shape.in_features, self.shape.out_features
        if not self.is_embedding:
            tokens, size = size, tokens
        if beyond := [index for index in self.config.token_indices if index >= tokens]:
            raise InputError(
                f"token {beyond[0]} is not in {self.shape.name}",
                field=self.config.field,
                allowed=f"0 to {tokens - 1:,}",
                fix="resize the model's embeddings first if the tokens are new",
            )
        return {self.key: TensorSpec((len(self.config.token_indices), size), live=self.live)}

    def initialize(self, p: Tensors) -> None:
        if self.config.init_weights:
            p[self.key].copy_(self.base_rows())
        else:
            p[self.key].normal_()

    def base_rows(self) -> Tensor:
        """The base's rows [tokens, size] that are replaced."""
        rows = self.weight().T if self.is_embedding else self.weight()
        return rows[torch.tensor(self.config.token_indices, device=rows.device)]

    def change(self, p: Tensors) -> Tensor:
        """New rows minus the base's, [tokens, size]."""
        new = p[self.key]
        return new - self.base_rows().to(new.dtype)

    def delta(self, p: Tensors) -> Tensor:
        change = self.change(p)
        index = torch.tensor(self.config.token_indices, device=change.device)
        tokens = self.shape.in_features if self.is_embedding else self.shape.out_features
        rows = change.new_zeros(tokens, change.shape[1]).index_copy(0, index, change)
        return rows.T if self.is_embedding else rows

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        change = self.change(p)
        if self.is_embedding:
            known = torch.tensor(self.sorted_indices, device=x.device)
            place = torch.searchsorted(known, x.contiguous()).clamp_max(len(known) - 1)
            row = torch.tensor(self.order, device=x.device)[place]
            return site.look_up(change, row) * (known[place] == x).unsqueeze(-1)
        scores = functional.linear(x, change.to(x.dtype))
        index = torch.tensor(self.config.token_indices, device=x.device)
        return scores.new_zeros(*x.shape[:-1], self.shape.out_features).index_copy(-1, index, scores)

    @cached_property
    def order(self) -> list[int]:
        """Positions in `token_indices` by rising token."""
        indices = self.config.token_indices
        return sorted(range(len(indices)), key=indices.__getitem__)

    @cached_property
    def sorted_indices(self) -> list[int]:
        return sorted(self.config.token_indices)


class TokensBeside(TrainableTokens):
    """The same under the name PEFT gives it beside another method."""

    key = "token_adapter.trainable_tokens_delta"
    live = "token_adapter.trainable_tokens_delta."
    stored_at_ties = False


def tokens_beside(indices: list[int] | dict[str, list[int]]) -> list[TrainableTokensConfig]:
    """What `trainable_token_indices` asks for: rows of the input embedding, or of each module named."""
    if isinstance(indices, dict):
        return [TokensBesideConfig(target_modules=[name], token_indices=rows) for name, rows in indices.items()]
    return [TokensBesideConfig(token_indices=indices)]
