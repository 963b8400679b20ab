"""FourierFT: dW = s Re(ifft2(F)), F [out, in] zero but for n learnt real numbers (Gao et al. 2024, arXiv 2405.03003).

Where they stand is not stored: the first n places of a permutation made from a seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from peftcli.adapters.base import DeltaAdapter, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.methods.vera import Seed
from peftcli.adapters.targets import pattern_value
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Count = Annotated[int, Ge(1)]


@dataclass
class FourierFTConfig(TunerConfig):
    """FourierFT's fields, as in PEFT.

    Attributes:
        n_frequency: how many entries of the spectrum are learnt.
        scaling: the factor s, large since ifft2 divides by in * out.
        random_loc_seed: seed of the places.
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        bias: which biases are trained: `none`, those of adapted modules (`fourier_only`), or `all`.
        n_frequency_pattern: n_frequency by module name or regular expression, where it differs.
        init_weights: True: no change at first. False, PEFT's default: the spectrum starts random.
    """

    peft_type = "FOURIERFT"
    prefix = "fourierft_"

    n_frequency: Count = 1000
    scaling: float | int = 150.0
    random_loc_seed: Seed = 777
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "fourier_only"] = "none"
    n_frequency_pattern: dict[str, Count] = field(default_factory=dict)
    init_weights: bool = False


class FourierFT(DeltaAdapter):
    """The real part of a sparse spectrum's inverse transform, scaled."""

    config: FourierFTConfig

    def initial_scaling(self) -> float:
        return self.config.scaling

    @cached_property
    def n_frequency(self) -> int:
        pattern, default = self.config.n_frequency_pattern, self.config.n_frequency
        return pattern_value(pattern, self.shape.name, default, field="n_frequency_pattern")

    def tensors(self) -> dict[str, TensorSpec]:
        out_features, in_features = self.shape.matrix
        if self.n_frequency > out_features * in_features:
            raise InputError(
                "`n_frequency` should be less than or equal to the product of the input and output dimensions but the "
                f"value passed is {self.n_frequency} and the product is {in_features * out_features}",
                place=self.shape.name,
                field="n_frequency",
            )
        return {
            "fourierft_spectrum": TensorSpec((self.n_frequency,), "zeros" if self.config.init_weights else "normal"),
            "fourierft_places": TensorSpec((self.n_frequency,), trainable=False, saved=False, dtype="int64"),
        }

    def initialize(self, p: Tensors) -> Tensor | None:
        return self.regenerate(p)

    def regenerate(self, p: Tensors) -> Tensor | None:
        """The places, as offsets into F row by row, on the CPU whatever the device: the same as in PEFT."""
        out_features, in_features = self.shape.matrix
        generator = torch.Generator().manual_seed(self.config.random_loc_seed)
        p.fourierft_places.copy_(torch.randperm(out_features * in_features, generator=generator)[: self.n_frequency])
        return None

    def delta(self, p: Tensors) -> Tensor:
        """Half of the spectrum is enough: Re(ifft2(F)) = ifft2(H) with the Hermitian H(u, v) = (F(u, v) + F(-u, -v)) / 2."""
        out_features, in_features = self.shape.matrix
        rows, columns = p.fourierft_places // in_features, p.fourierft_places % in_features
        rows = torch.cat([rows, -rows % out_features])
        columns = torch.cat([columns, -columns % in_features])
        stored = columns <= in_features // 2
        precise = p.fourierft_spectrum.to(torch.promote_types(p.fourierft_spectrum.dtype, torch.float32))
        values = (precise / 2).repeat(2) * stored
        half = values.new_zeros(out_features, in_features // 2 + 1)
        half = half.index_put((rows, columns * stored), values, accumulate=True)
        update = torch.fft.irfft2(half, s=(out_features, in_features))
        return (update * self.scaling).to(p.fourierft_spectrum.dtype)
