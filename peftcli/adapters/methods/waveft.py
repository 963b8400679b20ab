"""WaveFT: dW = s IDWT(C), the inverse wavelet transform of C [out, in], zero but for n learnt coefficients (Bilican et
al. 2025, arXiv 2505.12532).

Where they stand is not stored: the first n places of a permutation made from a seed, as in FourierFT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftcli.adapters.base import DeltaAdapter, Tensors, TensorSpec
from peftcli.adapters.config import TunerConfig
from peftcli.adapters.fit import ANY
from peftcli.adapters.methods.fourierft import Count
from peftcli.adapters.methods.vera import Seed
from peftcli.adapters.registry import Method
from peftcli.adapters.targets import pattern_value
from peftcli.adapters.wavelets import FAMILIES, low_pass
from peftcli.errors import InputError
from peftcli.lazy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class WaveFTConfig(TunerConfig):
    """WaveFT's fields, as in PEFT.

    Attributes:
        n_frequency: how many coefficients are learnt.
        scaling: the factor s.
        wavelet_family: Daubechies' `db1` (Haar's) to `db10`, symlets `sym2` to `sym10`, coiflets `coif1` to `coif3`.
        use_idwt: transform; False adds the sparse C itself.
        random_loc_seed: seed of the places.
        fan_in_fan_out: True for weights stored [in, out] (GPT-2's Conv1D); corrected from the module, with a warning.
        bias: which biases are trained: `none`, those of adapted modules (`waveft_only`), or `all`.
        n_frequency_pattern: n_frequency by module name or regular expression, where it differs.
        proportional_parameters: share n_frequency times the number of modules out by the modules' sizes instead; no
            pattern is looked at then.
        init_weights: True: no change at first. False: the coefficients start random.
    """

    peft_type = "WAVEFT"
    prefix = "waveft_"

    n_frequency: Count = 2592
    scaling: float | int = 25.0
    wavelet_family: Annotated[str, Field(pattern=FAMILIES)] = "db1"
    use_idwt: bool = True
    random_loc_seed: Seed = 777
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "waveft_only"] = "none"
    n_frequency_pattern: dict[str, Count] = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    def adapter_variant(self) -> Method | None:
        return Method("waveft", "WaveFTConfig", "ProportionalWaveFT") if self.proportional_parameters else None


class WaveFT(DeltaAdapter):
    """The inverse transform of a few coefficients, scaled."""

    config: WaveFTConfig

    def initial_scaling(self) -> float:
        return self.config.scaling

    @cached_property
    def n_frequency(self) -> int:
        pattern, default = self.config.n_frequency_pattern, self.config.n_frequency
        return pattern_value(pattern, self.shape.name, default, field="n_frequency_pattern")

    def tensors(self) -> dict[str, TensorSpec]:
        room = math.prod(self.shape.matrix)
        if self.n_frequency > room:
            raise InputError(
                "`n_frequency` should be less than or equal to the product of the input and output dimensions but the "
                f"value passed is {self.n_frequency} and the product is {room}",
                place=self.shape.name,
                field="n_frequency",
            )
        return {
            "waveft_spectrum": TensorSpec((self.n_frequency,), "zeros"),
            "waveft_places": TensorSpec((self.n_frequency,), trainable=False, saved=False, dtype="int64"),
        }

    def initialize(self, p: Tensors) -> Tensor | None:
        if not self.config.init_weights:
            p.waveft_spectrum.normal_(std=0.01)
        return self.regenerate(p)

    def regenerate(self, p: Tensors) -> Tensor | None:
        """The places, as offsets into C row by row, on the CPU whatever the device: the same as in PEFT."""
        generator = torch.Generator().manual_seed(self.config.random_loc_seed)
        places = torch.randperm(math.prod(self.shape.matrix), generator=generator)
        p.waveft_places.copy_(places[: self.n_frequency])
        _ = self.low  # computed here, where no compiler has to follow
        return None

    @cached_property
    def low(self) -> list[float]:
        """The wavelet's low-pass filter."""
        return low_pass(self.config.wavelet_family)

    def delta(self, p: Tensors) -> Tensor:
        out_features, in_features = self.shape.matrix
        rows, columns = p.waveft_places // in_features, p.waveft_places % in_features
        values = p.waveft_spectrum * self.scaling
        if not self.config.use_idwt:
            return values.new_zeros(self.shape.matrix).index_put((rows, columns), values)
        # The transform takes some rows and columns away: C is larger by as many, and its entries stand in the middle.
        low = self.low
        height, width = (size + len(low) - 2 + size % 2 for size in (out_features, in_features))
        places = rows + (height - out_features) // 2, columns + (width - in_features) // 2
        padded = values.new_zeros(height, width).index_put(places, values)
        return inverse_transform(padded, low)[:out_features, :in_features]


class ProportionalWaveFT(WaveFT):
    """As many coefficients as a module's share of all adapted weights."""

    knows_neighbours = True

    @classmethod
    def arrange(cls, adapters: list[Any]) -> None:
        sizes = [math.prod(adapter.shape.matrix) for adapter in adapters]
        for adapter, size in zip(adapters, sizes, strict=True):
            adapter.n_frequency = max(1, round(size / sum(sizes) * (adapter.config.n_frequency * len(sizes))))

    def file_tensors(self) -> dict[str, TensorSpec]:
        return {"waveft_spectrum": TensorSpec((ANY,))}


def inverse_transform(coefficients: Tensor, low: list[float]) -> Tensor:
    """One level of the two-dimensional inverse wavelet transform: [H, W] -> [H - len(low) + 2, W - len(low) + 2].

    The quarters of [H, W] are the coefficients of low and high frequencies: upper left low in both directions; upper
    right high along columns and low along rows, lower left the other way round (PEFT's order); lower right high.
    """
    smooth = coefficients.new_tensor(low)
    rough = smooth.flip(0) * smooth.new_tensor([1, -1]).repeat(len(low) // 2)
    pairs = [(smooth, smooth), (rough, smooth), (smooth, rough), (rough, rough)]
    filters = torch.stack([torch.outer(*pair) for pair in pairs]).unsqueeze(1)
    quarters = coefficients.unflatten(0, (2, -1)).unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)
    margin = len(low) - 2
    whole = functional.conv_transpose2d(quarters.unsqueeze(0), filters, stride=2)[0, 0]
    return whole[margin : whole.shape[0] - margin, margin : whole.shape[1] - margin]
