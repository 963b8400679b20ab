"""P-tuning: the prompt is what a small network makes of embeddings (Liu et al. 2021, arXiv 2103.10385).

prompt = MLP(E), or MLP(biLSTM(E)). The network only serves training: the file holds the prompt, not the network.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Lt

from peftcli.adapters.prompt_base import PromptLearningConfig, PromptMethod, Size
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

MLP_LAYERS = 2  # what PEFT calls the MLP's depth, which is fixed


class PromptEncoderReparameterizationType(str, Enum):
    """The network that makes the prompt."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning's fields, as in PEFT.

    Attributes:
        encoder_reparameterization_type: see `PromptEncoderReparameterizationType`.
        encoder_hidden_size: the network's hidden size; `token_dim` if None.
        encoder_num_layers: layers of the LSTM; an MLP is always of one depth.
        encoder_dropout: between the LSTM's layers.
    """

    peft_type = "P_TUNING"

    encoder_reparameterization_type: Literal["MLP", "LSTM"] | PromptEncoderReparameterizationType = (
        PromptEncoderReparameterizationType.MLP
    )
    encoder_hidden_size: Size | None = None
    encoder_num_layers: Size = MLP_LAYERS
    encoder_dropout: Annotated[float, Ge(0), Lt(1)] | Annotated[int, Ge(0), Lt(1)] = 0.0

    def validate(self) -> None:
        super().validate()
        if self.encoder_reparameterization_type not in ("MLP", "LSTM"):
            raise InputError(
                "Prompt encoder type not recognized. Please use one of MLP (recommended) or LSTM.",
                field="encoder_reparameterization_type",
                allowed="MLP, LSTM",
            )

    def complete(self, base_config: Any) -> None:
        super().complete(base_config)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim


class PTuning(PromptMethod):
    """A prompt made by a network."""

    config: PromptEncoderConfig

    @property
    def is_plain(self) -> bool:
        return self.config.inference_mode

    @property
    def is_lstm(self) -> bool:
        return self.config.encoder_reparameterization_type == "LSTM"

    def parts(self) -> dict[str, nn.Module | nn.Parameter | Tensor]:
        if self.is_plain:
            return super().parts()
        nn, hidden = torch.nn, self.config.encoder_hidden_size
        assert hidden is not None
        if not self.is_lstm:
            if self.config.encoder_num_layers != MLP_LAYERS:
                warnings.warn(
                    f"for MLP, the argument `encoder_num_layers` is ignored. Exactly {MLP_LAYERS} MLP layers are used.",
                    stacklevel=2,
                )
            layers = [nn.Linear(self.width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
            return super().parts() | {"mlp_head": nn.Sequential(*layers, nn.Linear(hidden, self.width))}
        lstm = nn.LSTM(
            self.width,
            hidden,
            num_layers=self.config.encoder_num_layers,
            dropout=self.config.encoder_dropout,
            bidirectional=True,
            batch_first=True,
        )
        head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, self.width))
        return super().parts() | {"lstm_head": lstm, "mlp_head": head}

    def prompt(self, p: Any, task_ids: Tensor | None = None) -> Tensor:
        rows = p.embedding.weight
        if self.is_plain:
            return rows
        # What is saved is computed in full precision, and not every CPU has an LSTM in bfloat16.
        with torch.autocast(rows.device.type, enabled=False):
            return p.mlp_head(p.lstm_head(rows)[0] if self.is_lstm else rows)
