"""What a prompt method states: the modules it trains, the prompt they make, and what its file holds. Needs no torch.

A prompt is a matrix [tokens, width]: rows put in front of the model's input embeddings, or in front of the keys and
values of every attention layer. `prompt.py` keeps the tensors and `prompt_inputs.py` puts the prompt where it belongs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le

from peftcli.adapters.config import HEADS, PeftConfig, TaskType, later
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

Size = Annotated[int, Ge(1), Le(1_000_000)]

BASE_FACTS = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}
"""Config field -> what a base's config may call it."""


@dataclass
class PromptLearningConfig(PeftConfig):
    """Fields of the methods that learn a prompt. What is None is taken from the base's config.

    Attributes:
        num_virtual_tokens: length of the prompt.
        token_dim: dimension of the base's embeddings; of all key heads of one layer for prefix tuning.
        num_transformer_submodules: 2 for an encoder-decoder, else 1.
        num_attention_heads: heads of an attention layer; key heads for prefix tuning.
        num_layers: layers of the base.
        modules_to_save: modules trained in full and stored beside the prompt. A task's heads go without saying.
    """

    is_prompt_learning: ClassVar[bool] = True

    num_virtual_tokens: Size | None = None
    token_dim: Size | None = None
    num_transformer_submodules: Annotated[int, Ge(1), Le(2)] | None = None
    num_attention_heads: Size | None = None
    num_layers: Size | None = None
    modules_to_save: list[str] | None = later(None, since="0.14")

    def validate(self) -> None:
        super().validate()
        if self.num_virtual_tokens is None:
            raise InputError("must be given", field="num_virtual_tokens", allowed="a number, e.g. 20")

    def complete(self, base_config: Any) -> None:
        """Take what was left open from the base's config (of its language model, where it has several).

        Raises:
            InputError: if the base's config does not tell.
        """
        text = base_config.get_text_config() if hasattr(base_config, "get_text_config") else base_config
        for field, names in BASE_FACTS.items():
            if getattr(self, field) is None:
                known = (getattr(text, name, None) for name in names)
                value = next((value for value in known if value is not None), None)
                if value is None:
                    raise InputError(f"Please specify `{field}` in `peft_config`", field=field)
                setattr(self, field, value)
        if self.num_transformer_submodules is None:
            self.num_transformer_submodules = 2 if self.task_type == TaskType.SEQ_2_SEQ_LM else 1

    def to_saved_dict(self) -> dict[str, Any]:
        values = super().to_saved_dict()
        heads = HEADS.get(self.task, [])
        extra = [name for name in self.modules_to_save or [] if name not in heads]
        values.pop("modules_to_save", None)
        return values | {"modules_to_save": extra} if extra else values


class PromptMethod:
    """One prompt method. Holds no tensors: `p` is the module that does, with PEFT's names as attributes.

    Args:
        config: the method's config, completed from the base.
    """

    feeds: ClassVar[Literal["embeddings", "cache"]] = "embeddings"
    """Where the prompt goes: in front of the embeddings, or of each layer's keys and values."""

    in_decoder: ClassVar[bool] = False
    """Whether an encoder-decoder's second half of the prompt goes in front of the decoder's embeddings."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def tokens(self) -> int:
        """Rows of the prompt."""
        return self.config.num_virtual_tokens * (self.config.num_transformer_submodules or 1)

    @property
    def width(self) -> int:
        """Columns of the prompt."""
        return self.config.token_dim

    @property
    def is_plain(self) -> bool:
        """Whether the prompt is an embedding's own rows. A loaded one is: files hold what an encoder gave, not itself."""
        return True

    def parts(self) -> dict[str, nn.Module | nn.Parameter | Tensor]:
        """Fresh modules, parameters, and tensors that stay fixed, by PEFT's live names."""
        return {"embedding": torch.nn.Embedding(self.tokens, self.width)}

    def initialize(self, p: Any, words: nn.Embedding) -> None:
        """Set what `parts` could not, in place, under no_grad; `words` are the base's input embeddings."""

    def prompt(self, p: Any, task_ids: Tensor | None = None) -> Tensor:
        """The prompt [tokens, width], or one for each row of the batch [B, tokens, width] where tasks differ."""
        return p.embedding.weight

    def key_values(self, prompt: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [heads, tokens, head_dim] of each layer, where the prompt feeds the cache."""
        raise NotImplementedError

    def live(self, p: Any) -> dict[str, Tensor]:
        """The tensors that a file's keys stand for, where `is_plain`."""
        return {"prompt_embeddings": p.embedding.weight}

    def accept(self, p: Any, tensors: Mapping[str, Tensor]) -> None:
        """Take in a file's tensors, in place, under no_grad, where `live` is not the tensors themselves."""

    def stored(self, p: Any) -> dict[str, Tensor]:
        """What the file holds, by key."""
        return self.live(p) if self.is_plain else {"prompt_embeddings": self.prompt(p)}

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what the file holds, by key."""
        return {"prompt_embeddings": (self.tokens, self.width)}


def fixed_embedding(tokens: int, width: int) -> nn.Embedding:
    """An embedding whose rows are not trained."""
    embedding = torch.nn.Embedding(tokens, width)
    weight = embedding.weight.detach()
    del embedding.weight
    embedding.register_buffer("weight", weight)
    return embedding
