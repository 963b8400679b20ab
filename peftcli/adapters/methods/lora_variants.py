"""Settings of LoRA's variants that have an equation of their own; the equations are in the file each entry names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from peftcli.adapters.registry import Method

Count = Annotated[int, Ge(1), Le(1 << 20)]
Positive = Annotated[float, Gt(0)] | Annotated[int, Gt(0)]
Weight = Annotated[float, Ge(0)] | Annotated[int, Ge(0)]


@dataclass
class BdLoraConfig:
    """Which factors are block-diagonal (BD-LoRA).

    Attributes:
        target_modules_bd_a, target_modules_bd_b: parts of the names of modules whose A, or B, is.
        nblocks: blocks of such a factor; the number of devices that are to serve the adapter.
        match_strict: refuse modules neither list names; otherwise they get plain LoRA.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: Count = 1
    match_strict: bool = True


@dataclass
class KasaConfig:
    """Weights of KaSA's terms of the loss.

    Attributes:
        beta: of the penalty on the singular values.
        gamma: of the penalty that keeps A and B orthogonal.
    """

    beta: Weight = 1e-4
    gamma: Weight = 1e-3


@dataclass
class MontecloraConfig:
    """How MonteCLoRA samples.

    Attributes:
        num_samples: samples that are averaged, each with a weight of its own.
        use_entropy: add the sum of the squared weights to the loss, so that no sample takes all.
        dirichlet_prior: concentration of the prior over the weights.
        sample_scaler: factor on the noise.
        kl_loss_weight: weight of the divergence from the priors in the loss.
        buffer_size: how many samples PEFT draws ahead; ours are drawn when needed.
    """

    num_samples: Annotated[int, Ge(2), Le(1 << 20)] = 8
    use_entropy: bool = False
    dirichlet_prior: Positive = 0.1
    sample_scaler: float | int = 1e-4
    kl_loss_weight: float | int = 1e-5
    buffer_size: Count = 150


@dataclass
class VeloraConfig:
    """How VeLoRA compresses what the backward pass needs of the inputs.

    Attributes:
        num_groups: numbers kept of each input: one for each group of features.
        scale: factor on the inputs rebuilt from them.
        init_type: where the direction of the projection comes from: the mean of each batch, of the first batch, or chance.
    """

    num_groups: Count = 64
    scale: Positive = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"


SETTINGS = {
    "use_bdlora": BdLoraConfig,
    "kasa_config": KasaConfig,
    "monteclora_config": MontecloraConfig,
    "velora_config": VeloraConfig,
}
"""The classes of the fields of LoraConfig that hold such settings."""

VARIANTS = {
    "use_dora": Method("dora", "LoraConfig", "Dora"),
    "alora_invocation_tokens": Method("alora", "LoraConfig", "Alora"),
    "use_bdlora": Method("bdlora", "LoraConfig", "BdLora"),
    "kasa_config": Method("kasa", "LoraConfig", "Kasa"),
    "monteclora_config": Method("monteclora", "LoraConfig", "Monteclora"),
    "velora_config": Method("velora", "LoraConfig", "Velora"),
}
"""By the field of LoraConfig that asks for it."""
