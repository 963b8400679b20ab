"""Sites: one adapted module each, seen as a matrix [out, in] whatever the module stores.

Layer kind and quantisation live only here. A method never asks what it sits on: it gets the weight as a matrix, and its
result is applied by the site.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch  # noqa: TID253
import torch.nn.functional as F  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253
from torch.func import functional_call  # noqa: TID253
from torch.nn.utils.parametrize import is_parametrized  # noqa: TID253
from torch.utils.checkpoint import checkpoint  # noqa: TID253

from peftcli.adapters.base import Adapter, SiteKind, SiteShape
from peftcli.adapters.fused import linear_with_update


class Site:
    """An adapted module whose weight is a matrix.

    Args:
        module: the module as it stands in the base model.
        name: its path there.
    """

    kind: ClassVar[SiteKind] = "linear"
    parameter: ClassVar[str] = "weight"
    bias_parameter: ClassVar[str] = "bias"
    elementwise_io: ClassVar[bool] = True
    """Whether inputs are [..., in] and outputs [..., out], so that adapters may act on them directly."""
    elementwise_output: ClassVar[bool] = True
    """Whether at least outputs are [..., out]."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    @property
    def stored(self) -> Tensor:
        """The parameter as the module stores it."""
        return self.module.get_parameter(self.parameter)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, self.bias_parameter, None)

    @property
    def shape(self) -> SiteShape:
        out_features, in_features = self.stored.shape
        return SiteShape(self.name, self.kind, in_features, out_features, has_bias=self.bias is not None)

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def weight(self) -> Tensor:
        """The weight as a matrix [out, in]."""
        return self.stored

    def adapter(self, method: type[Adapter], config: Any) -> Adapter:
        """A method at this module, able to read its weight and bias."""
        return method(config, self.shape, self.weight, self.get_bias)

    def get_bias(self) -> Tensor | None:
        return self.bias

    def to_stored(self, matrix: Tensor) -> Tensor:
        """A matrix [out, in] as the module stores it."""
        return matrix

    def project(self, x: Tensor) -> Tensor:
        """W x, without the bias."""
        return self.run(self.weight(), None, x)

    def run(self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """What the module computes with another weight [out, in] and bias [out]; None is no bias."""
        tensors: dict[str, Tensor | None] = {self.parameter: self.to_stored(weight)}
        if self.bias is not None:
            tensors[self.bias_parameter] = torch.zeros_like(self.bias) if bias is None else bias
        return functional_call(self.module, cast(dict[str, Tensor], tensors), args, kwargs)

    def run_rebuilt(self, weights: Callable[[], tuple[Tensor, Tensor | None]], *args: Any, **kwargs: Any) -> Any:
        """`run` with a weight and bias that are built again in the backward pass instead of kept for it."""
        if not torch.is_grad_enabled():
            return self.run(*weights(), *args, **kwargs)
        return checkpoint(lambda *args: self.run(*weights(), *args, **kwargs), *args, use_reentrant=False)

    def with_update(self, x: Tensor, a: Tensor, b: Tensor, gain: Tensor | None = None) -> Tensor | None:
        """The module's output plus B (A x), times a gain [out] but for the bias; None where that is no one operation."""
        return None

    @property
    def is_bare(self) -> bool:
        """Whether calling the module does nothing but its own computation: no hooks (offloading puts some there)."""
        module = self.module
        return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))

    def merged_module(self, weight: Tensor, bias: Tensor | None) -> nn.Module | None:
        """What holds a merged weight [out, in] where the module itself can't; None where its parameter is swapped."""
        return None

    def broadcast(self, vector: Tensor) -> Tensor:
        """A vector [out] shaped to act on the module's output."""
        return vector

    def look_up(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows of a table that stands for the module's own, where it is an embedding."""
        raise TypeError(f"{self.name} looks nothing up")

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """B (A x) for A [r, in] and B [out, r]. The small factors are cast to x's dtype, never x to theirs."""
        return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


class LinearSite(Site):
    """nn.Linear: the weight is the matrix."""

    def run(self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        return F.linear(args[0] if args else kwargs["input"], weight, bias)

    def with_update(self, x: Tensor, a: Tensor, b: Tensor, gain: Tensor | None = None) -> Tensor | None:
        weight, bias = self.weight(), self.bias
        frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        plain = type(self.module) is nn.Linear and self.is_bare and type(weight) is nn.Parameter
        if not (plain and frozen) or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
            return None
        return linear_with_update(x, weight, bias, a, b, gain)


class TransposedSite(LinearSite):
    """GPT-2's Conv1D: a linear layer that stores [in, out]."""

    @property
    def shape(self) -> SiteShape:
        in_features, out_features = self.stored.shape
        return SiteShape(self.name, self.kind, in_features, out_features, has_bias=self.bias is not None)

    def weight(self) -> Tensor:
        return self.stored.T

    def to_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T


class ConvSite(Site):
    """nn.Conv1d, 2d, 3d: the matrix is [out, in/groups * kernel], as `unfold` orders it."""

    kind = "conv"
    elementwise_io = elementwise_output = False
    module: nn.Conv2d  # stands for all three: they share every attribute used here

    @property
    def shape(self) -> SiteShape:
        conv = self.module
        return SiteShape(
            self.name,
            self.kind,
            conv.in_channels,
            conv.out_channels,
            kernel=tuple(conv.kernel_size),
            groups=conv.groups,
            has_bias=conv.bias is not None,
        )

    def weight(self) -> Tensor:
        return self.stored.flatten(1)

    def to_stored(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(matrix.shape[0], *self.stored.shape[1:])

    def broadcast(self, vector: Tensor) -> Tensor:
        return vector.reshape(-1, *[1] * (self.stored.dim() - 2))

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        # A is a convolution to r channels with the module's own stride, padding and dilation; B is one of kernel 1.
        # The rows of a grouped weight belong to their group, so every group gets the same A.
        kernel = a.to(x.dtype).reshape(a.shape[0], *self.stored.shape[1:])
        groups = self.module.groups
        hidden = self.module._conv_forward(x, kernel.repeat(groups, *[1] * (kernel.dim() - 1)), None)
        pointwise = b.to(x.dtype).reshape(*b.shape, *[1] * (kernel.dim() - 2))
        return self._convolve(hidden, pointwise, groups=groups)

    def across_groups(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """B (A x) for A [r, in, kernel], which reads the channels of all groups, and B [out, r / groups or r, 1...]."""
        conv, padded = self.module, self.module.padding_mode != "zeros"
        if padded:
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        hidden = self._convolve(x, a.to(x.dtype), None, conv.stride, 0 if padded else conv.padding, conv.dilation)
        return self._convolve(hidden, b.to(x.dtype), groups=a.shape[0] // b.shape[1])

    @property
    def _convolve(self) -> Callable[..., Tensor]:
        return (F.conv1d, F.conv2d, F.conv3d)[self.stored.dim() - 3]


class EmbeddingSite(Site):
    """nn.Embedding: tokens are the inputs, so the matrix is [dim, tokens]."""

    kind = "embedding"
    elementwise_io = False

    @property
    def shape(self) -> SiteShape:
        tokens, dim = self.stored.shape
        return SiteShape(self.name, self.kind, tokens, dim)

    def weight(self) -> Tensor:
        return self.stored.T

    def to_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        # Through the module, so that a scaled embedding (Gemma) scales the adapter's part as well.
        rows = functional_call(self.module, {self.parameter: a.T.to(b.dtype)}, (x,))
        return F.linear(rows, b.to(rows.dtype))

    def look_up(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows of another table [rows, dim] as the module would give them: scaled where it scales its own (Gemma)."""
        scale = torch.as_tensor(getattr(self.module, "embed_scale", 1.0), device=table.device)
        return F.embedding(ids, table) * scale.to(self.dtype)


class AttentionSite(Site):
    """nn.MultiheadAttention's packed input projection [3 * embed, embed]; its `out_proj` is a site of its own."""

    kind = "attention"
    elementwise_io = elementwise_output = False
    parameter = "in_proj_weight"
    bias_parameter = "in_proj_bias"


class ParameterSite(Site):
    """A parameter that no module of its own holds, e.g. the experts of a mixture fused into [experts, out, in].

    Args:
        module: the module that owns the parameter.
        name: its path.
        parameter: the parameter's name.
    """

    kind = "parameter"
    elementwise_io = False

    def __init__(self, module: nn.Module, name: str, parameter: str) -> None:
        super().__init__(module, name)
        self.parameter = parameter  # type: ignore[misc]  # other sites know it from their class
        self.called, self.prefix = module, ""

    def wrap(self, layer: nn.Module) -> None:
        """Another parameter of the module is adapted as well: call the layer that does it, one step further out."""
        self.called = layer
        depth = 0
        while layer is not self.module:
            layer, depth = layer.base_layer, depth + 1  # type: ignore[assignment]
        self.prefix = "base_layer." * depth

    @property
    def bias(self) -> Tensor | None:
        return None

    @property
    def shape(self) -> SiteShape:
        experts, out_features, in_features = (1, *self.stored.shape) if self.stored.dim() == 2 else self._fused().shape
        return SiteShape(f"{self.name}.{self.parameter}", self.kind, in_features, out_features, experts=experts)

    def _fused(self) -> Tensor:
        """[experts, out, in], whichever way the model stores its experts."""
        return self.stored.transpose(1, 2) if getattr(self.module, "is_transposed", False) else self.stored

    def weight(self) -> Tensor:
        return self.stored if self.stored.dim() == 2 else self._fused()

    def to_stored(self, matrix: Tensor) -> Tensor:
        return matrix.transpose(1, 2) if matrix.dim() == 3 and getattr(self.module, "is_transposed", False) else matrix

    def run(self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.called, {self.prefix + self.parameter: self.to_stored(weight)}, args, kwargs)


def site_for(module: nn.Module, name: str) -> Site | None:
    """The site a module is, or None for a module whose weight is not one we know how to see as a matrix."""
    from transformers.pytorch_utils import Conv1D

    from peftcli.adapters.quantized import quantized_site

    if is_parametrized(module):
        return None  # its weight is computed (weight norm), so no parameter could take a merged one
    if isinstance(module, nn.MultiheadAttention):
        return AttentionSite(module, name) if module.in_proj_weight is not None else None
    if isinstance(module, nn.Linear):
        return quantized_site(module, name) or LinearSite(module, name)
    if isinstance(module, Conv1D):
        return TransposedSite(module, name)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ConvSite(module, name)
    if isinstance(module, nn.Embedding):
        return EmbeddingSite(module, name)
    return None
