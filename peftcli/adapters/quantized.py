"""Sites of bitsandbytes' quantised linear layers: the weight is dequantised where it is read and never written back.

Re-quantising W + dW snaps almost all of a small dW back to the same code (98 % of an adapter is lost in NF4), so a merge
puts an ordinary linear layer in the quantised one's place.
"""

from __future__ import annotations

from typing import Any

import torch  # noqa: TID253
import torch.nn.functional as F  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters.base import SiteShape
from peftcli.adapters.sites import LinearSite
from peftcli.errors import InputError


class QuantizedSite(LinearSite):
    """A linear layer whose stored weight is not a matrix of numbers."""

    module: Any

    @property
    def shape(self) -> SiteShape:
        module = self.module
        return SiteShape(self.name, self.kind, module.in_features, module.out_features, has_bias=self.bias is not None)

    def run(self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs["input"]
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def to_stored(self, matrix: Tensor) -> Tensor:
        """Refused: a start or an adapter that changes the base weight would have to quantise it again.

        Raises:
            InputError: always.
        """
        raise InputError(
            "the base weight would have to change, and this module's is quantised",
            place=self.name,
            fix="use the base unquantised, or a start that leaves it as it is",
        )

    def merged_module(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        out_features, in_features = weight.shape
        linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear.train(self.module.training)


class Linear4bitSite(QuantizedSite):
    """bitsandbytes' Linear4bit (NF4, FP4)."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        keep_layout(module)

    @property
    def dtype(self) -> torch.dtype:
        """What the weight dequantises to."""
        state = self.state
        return state.dtype if state is not None else self.stored.dtype

    @property
    def state(self) -> Any:
        """What dequantises the weight, or None before it is quantised; where FSDP gathered the weight only the module has it."""
        return getattr(self.stored, "quant_state", None) or getattr(self.module, "quant_state", None)

    def weight(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.stored.data, self.state)


class Linear8bitSite(QuantizedSite):
    """bitsandbytes' Linear8bitLt (LLM.int8): one scale a row."""

    @property
    def dtype(self) -> torch.dtype:
        """The model's precision if `prepare_model_for_kbit_training` has said it, the bias's, or what LLM.int8 computes in."""
        told = getattr(self.module, "compute_dtype", None)
        return told or (self.bias.dtype if self.bias is not None else torch.float16)

    def weight(self) -> Tensor:
        scales = self.module.state.SCB if self.module.state.SCB is not None else self.stored.SCB  # type: ignore[attr-defined]
        return (self.stored.data.float() * scales.float()[:, None] / 127).to(self.dtype)


INT8 = "Linear8bitLt"
QUANTIZED_SITES: dict[str, type[QuantizedSite]] = {"Linear4bit": Linear4bitSite, INT8: Linear8bitSite}
"""By class name, so that bitsandbytes need not be imported to find that a model has no such layer."""


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' quantised linear layers."""
    return _site_class(module) is not None


def backend_of(module: nn.Module) -> str | None:
    """PEFT's name of what quantised a module, or None."""
    kind = _site_class(module)
    return None if kind is None else "bnb 4bit" if kind is Linear4bitSite else "bnb 8bit"


def quantized_site(module: nn.Module, name: str) -> QuantizedSite | None:
    """The site of a quantised layer, or None for any other module."""
    kind = _site_class(module)
    return kind(module, name) if kind else None


def keep_layout(module: nn.Module) -> None:
    """Keep a 4-bit layer from repacking its weight, and undo it where it has.

    On CPUs with AVX512-BF16 an eval forward repacks the weight in place, after which dequantising gives garbage and
    training sees other numbers than before.
    """
    if _site_class(module) is not Linear4bitSite:
        return
    layer: Any = module
    layer.support_avx512bf16_for_cpu = False
    state: Any = getattr(layer.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)


def _site_class(module: nn.Module) -> type[QuantizedSite] | None:
    return next((QUANTIZED_SITES[c.__name__] for c in type(module).__mro__ if c.__name__ in QUANTIZED_SITES), None)
