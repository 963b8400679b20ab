"""What a method states: its tensors and one equation. Forward, merge, unmerge, saving and loading are derived from it.

A method is a class of one of five families. It holds no parameters: the layer that wraps the adapted module does, under
PEFT's names, and hands them in as `p` (so the same equation serves a live model, a merge of files and a memory plan).

| family             | equation                    | the method writes                                   |
|--------------------|-----------------------------|-----------------------------------------------------|
| `LowRankAdapter`   | y = W x + b + B (A x)       | `factors(p)` -> A [r, in], B [out, r]               |
| `DeltaAdapter`     | y = (W + dW) x + b          | `delta(p)` -> dW [out, in]; `activation` to be quick  |
| `TransformAdapter` | y = after(W before(x) + b)  | `before(p, x)` and/or `after(p, y)`                 |
| `CopyAdapter`      | y = copy(x)                 | `names` of the parts                                |
| `SideAdapter`      | y = module(x) + side(x)     | `side(p, module, inputs)`                           |

Weights are always meant as the matrix [out, in] that multiplies a column of inputs, whatever the module stores: a
convolution is [out, in/groups * kernel], an embedding [dim, tokens], GPT-2's Conv1D its transpose. `Site` translates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftcli.adapters.context import ForwardContext
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from peftcli.adapters.sites import Site

SiteKind = Literal["linear", "conv", "embedding", "attention", "parameter", "module"]
"""What a method can tell apart. `linear` includes GPT-2's Conv1D and quantised layers; `module` is anything else."""

Init = Literal["zeros", "ones", "kaiming", "normal", "empty"]


@dataclass(frozen=True)
class SiteShape:
    """The shape of one adapted module, known without its weights.

    Attributes:
        name: path in the base model, `model.layers.0.self_attn.q_proj`.
        kind: see `SiteKind`.
        in_features: input features, channels, or tokens of an embedding.
        out_features: output features, channels, or the dimension of an embedding.
        kernel: kernel of a convolution, () elsewhere.
        groups: groups of a convolution.
        has_bias: whether the module has a bias.
        experts: for a fused stack of matrices [experts, ...], how many; 1 elsewhere.
    """

    name: str
    kind: SiteKind
    in_features: int
    out_features: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    has_bias: bool = False
    experts: int = 1

    @property
    def matrix(self) -> tuple[int, int]:
        """The weight's shape [out, in] as a matrix."""
        return self.out_features, self.in_features // self.groups * math.prod(self.kernel)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor a method keeps at a site.

    Attributes:
        shape: its shape, also in the file.
        init: how a fresh one is filled; anything else is done in `Adapter.initialize`.
        trainable: False for state that is stored but not learnt.
        saved: False for state regenerated from a seed.
        dtype: torch dtype name of a tensor that is not of the adapter's floating type, e.g. `int32`.
        shared: kept once a model, saved as `base_model.<name>`; all sites see the same tensor.
        live: name in the running model where PEFT's differs from the file's; the adapter's name follows the first part,
            or comes last if this ends with a dot.
        owner: the module before this one whose tensor of this name it is, too; files repeat it at each.
    """

    shape: tuple[int, ...]
    init: Init = "empty"
    trainable: bool = True
    saved: bool = True
    dtype: str | None = None
    shared: bool = False
    live: str | None = None
    owner: str | None = None


class Tensors(dict[str, "Tensor"]):
    """An adapter's tensors at one site, by the name of the file's key after the module path.

    `p.lora_A` is short for `p["lora_A.weight"]` or `p["lora_A"]`, whichever exists.
    """

    def __getattr__(self, name: str) -> Tensor:
        weight = self.get(f"{name}.weight")
        if weight is not None:
            return weight
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the floating tensors."""
        return next(t.dtype for t in self.values() if t.is_floating_point())

    def to(self, dtype: torch.dtype) -> Tensors:
        """The same tensors with floating ones cast to `dtype` (through autograd)."""
        return Tensors({name: t.to(dtype) if t.is_floating_point() else t for name, t in self.items()})


BaseWeight = Callable[[], "Tensor"]
"""Gives the base weight as a matrix [out, in] (dequantised, gathered). A call, since it may be costly."""

BaseBias = Callable[[], "Tensor | None"]
"""Gives the base bias [out], or None where there is none."""


class Adapter:
    """One adapter at one site: tensors declared, equation stated, no parameters owned.

    Args:
        config: the method's config.
        shape: the site's shape.
        weight, bias: give the base weight as a matrix, and the bias; only methods whose equation needs them call them.

    The layer that holds the adapter keeps `context` (facts about the running batch) and `training` (its mode) up to date.
    """

    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear"})
    """Site kinds the method means something for; others are refused by name."""

    mergeable: ClassVar[bool] = True

    follows_ties: ClassVar[bool] = False
    """Whether modules that share the adapted module's weight (tied embeddings) are adapted by the same tensors."""

    stored_at_ties: ClassVar[bool] = False
    """Whether the file repeats the tensors at the modules that follow."""

    knows_neighbours: ClassVar[bool] = False
    """Whether what it does at a module depends on which others are adapted, in the model's order (see `arrange`)."""

    rows_interact: ClassVar[bool] = False
    """Whether what a row of a batch gets depends on the other rows."""

    needs_rows: ClassVar[bool] = False
    """Whether it must see which row of a batch a token is in, so that samples can't be laid end to end in one row."""

    obsolete: ClassVar[frozenset[str]] = frozenset()
    """Last parts of keys that other versions' files hold at a module and nothing needs."""

    def __init__(
        self, config: Any, shape: SiteShape, weight: BaseWeight | None = None, bias: BaseBias | None = None
    ) -> None:
        self.config, self.shape, self._weight, self._bias = config, shape, weight, bias
        self.scaling: float = self.initial_scaling()
        self.context = ForwardContext()
        self.training = False

    @classmethod
    def arrange(cls, adapters: list[Any]) -> None:
        """Tell the adapters of one config at all sites, in the model's order, what they must know of each other."""

    def initial_scaling(self) -> float:
        """The factor on the update (alpha / r for LoRA); kept as an attribute so that users can rescale an adapter."""
        return 1.0

    def merge_problem(self) -> str | None:
        """Why this adapter can't be merged into its module's weight, or None where it can."""
        return None if self.mergeable else f"{self.config.peft_type} adapters cannot be merged"

    def weight(self) -> Tensor:
        """The base weight as a matrix [out, in]."""
        if self._weight is None:
            raise RuntimeError(f"{type(self).__name__} needs the base weight of {self.shape.name}")
        return self._weight()

    def bias(self) -> Tensor:
        """The base bias [out]."""
        bias = self._bias() if self._bias else None
        if bias is None:
            raise RuntimeError(f"{type(self).__name__} needs the base bias of {self.shape.name}")
        return bias

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of this adapter at this site, by the key's last part (`lora_A.weight`). Needs no torch."""
        raise NotImplementedError

    def initialize(self, p: Tensors) -> Tensor | None:
        """Fill what the specs' `init` could not, in place, under no_grad.

        Returns:
            A new base weight [out, in] where the method takes its start out of the base (PiSSA, OLoRA), else None.
        """
        return None

    def regenerate(self, p: Tensors) -> Tensor | None:
        """Fill what a file does not hold, before it is loaded; in place, under no_grad. Returns as `initialize`."""
        return None

    def dropped(self, p: Tensors) -> Tensors:
        """The tensors as one training pass sees them, where a method drops parts of itself at random."""
        return p

    def file_tensors(self) -> dict[str, TensorSpec]:
        """The tensors a file holds under the module's name, by the key's last part. Needs no torch."""
        return {key: spec for key, spec in self.tensors().items() if spec.saved and not spec.shared}

    def stored(self, p: Tensors) -> dict[str, Tensor]:
        """The tensors as the file holds them, by the key's last part."""
        return {key: p[key] for key in Adapter.file_tensors(self)}

    def restored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `stored`; also where values no shape can tell wrong (indices) are refused."""
        return tensors

    @classmethod
    def make_shared(cls, adapters: list[Adapter], config: Any) -> dict[str, Tensor]:
        """Initial values of the tensors kept once a model, from all sites at once; others are filled by their spec."""
        return {}

    # -- while training -------------------------------------------------------------------------------------------

    @classmethod
    def regularization(cls, sites: list[tuple[Adapter, Tensors]], config: Any) -> Tensor | None:
        """A term () for the loss, from one adapter's tensors at all its sites."""
        return None

    @classmethod
    def after_step(cls, sites: list[tuple[Adapter, Tensors]], config: Any, step: int) -> None:
        """What follows optimizer step `step` (counted from 1), gradients still there (AdaLoRA takes ranks away)."""

    @classmethod
    def stored_config(cls, sites: list[tuple[Adapter, Tensors]], config: Any) -> Any:
        """The config that belongs to what `stored` gives, where training changed it."""
        return config.stored()

    # -- derived --------------------------------------------------------------------------------------------------

    def merged_weight(self, p: Tensors, weight: Tensor) -> Tensor:
        """The weight [out, in] that makes the bare module compute what module + adapter do."""
        raise NotImplementedError

    def merged_bias(self, p: Tensors, bias: Tensor) -> Tensor:
        """The bias [out] that belongs to `merged_weight`."""
        return bias


class DeltaAdapter(Adapter):
    """y = (W + dW) x + b. The method writes `delta`."""

    kinds = frozenset({"linear", "conv", "embedding", "attention", "parameter"})

    @property
    def dropout(self) -> float:
        """Probability with which inputs of the adapter's path are dropped in training."""
        return 0.0

    @property
    def drops(self) -> bool:
        """Whether training leaves out any of the update, so that W + dW can't stand for it."""
        return self.dropout > 0

    def keep(self) -> Tensor | None:
        """Factors [out] on the features of the update in one training pass, 0 for dropped ones; None keeps all."""
        return None

    def delta(self, p: Tensors) -> Tensor:
        """dW as a matrix [out, in], scaling included, in the dtype of `p`."""
        raise NotImplementedError

    @property
    def builds_delta(self) -> bool:
        """Whether building dW is the best there is at this site, and `activation` gives None."""
        return type(self).activation is DeltaAdapter.activation

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        """dW x for x [..., in] without building dW, or None where building it is the best there is.

        `x` may be of lower precision than `p`: cast what is small (`p.to(x.dtype)`), never x.
        """
        return None

    def with_module(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        """What module and adapter give for x together, where site and method do that in one operation, else None."""
        return None

    def merged_weight(self, p: Tensors, weight: Tensor) -> Tensor:
        return weight + self.delta(p).to(weight.dtype)


class LowRankAdapter(DeltaAdapter):
    """y = W x + b + B (A x). The method writes `factors`; sites apply them without building B A."""

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] with the scaling folded into one of them."""
        raise NotImplementedError

    def delta(self, p: Tensors) -> Tensor:
        a, b = self.factors(p)
        return b @ a

    def activation(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        return site.low_rank(x, *self.factors(p))

    def with_module(self, p: Tensors, x: Tensor, site: Site) -> Tensor | None:
        plain = type(self).activation is LowRankAdapter.activation
        return site.with_update(x, *self.factors(p)) if plain else None


class TransformAdapter(Adapter):
    """y = after(W before(x) + b). The method writes one or both; each is linear in its last dimension."""

    kinds = frozenset({"linear", "conv", "attention", "parameter"})
    transforms_bias: ClassVar[bool] = True
    """Whether `after` acts on W x + b (True) or on W x alone (False)."""

    def before(self, p: Tensors, x: Tensor) -> Tensor:
        """x [..., in] on its way into the base module."""
        return x

    def after(self, p: Tensors, y: Tensor) -> Tensor:
        """y [..., out] on its way out."""
        return y

    @property
    def acts_on_inputs(self) -> bool:
        """Whether there is a `before`."""
        return type(self).before is not TransformAdapter.before

    @property
    def acts_on_outputs(self) -> bool:
        """Whether there is an `after`."""
        return type(self).after is not TransformAdapter.after

    def merged_weight(self, p: Tensors, weight: Tensor) -> Tensor:
        columns = weight.T
        if self.acts_on_inputs:  # rows of the identity are the unit inputs: pushed through, they give the columns
            columns = self.before(p, torch.eye(len(columns), dtype=weight.dtype, device=weight.device)) @ columns
        return (self.after(p, columns) if self.acts_on_outputs else columns).T

    def merged_bias(self, p: Tensors, bias: Tensor) -> Tensor:
        return self.after(p, bias.unsqueeze(0)).squeeze(0) if self.acts_on_outputs and self.transforms_bias else bias


class SideAdapter(Adapter):
    """y = module(x) + side(x) at a whole module. The method writes `side`, and knows the module's inputs and parts."""

    kinds = frozenset({"module"})
    mergeable = False
    needs_rows = True

    def side(self, p: Tensors, module: Any, inputs: dict[str, Any]) -> Tensor:
        """What to add to the module's output (its first part, if it gives several).

        Args:
            p: the adapter's tensors.
            module: the adapted module.
            inputs: what it is called with, by the names of its arguments.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class CopyNames:
    """What PEFT calls the parts of a layer that keeps copies of a module.

    Attributes:
        original: the child that is the module itself.
        copies: the child that holds a copy for each adapter.
        saved: what the file's keys have between the module's path and the parameter's name.
        what: the kind of adapter, for messages.
        wrapper: the layer itself.
    """

    original: str
    copies: str
    saved: str
    what: str
    wrapper: str


class CopyAdapter(Adapter):
    """y = copy(x), the module trained in full. The method writes `names`; `tensors` describes the usual module."""

    kinds = frozenset({"module"})
    names: ClassVar[CopyNames]


def fill(tensor: Tensor, init: Init, generator: torch.Generator | None = None) -> None:
    """Fill a fresh parameter in place as its spec says."""
    if init == "zeros":
        tensor.zero_()
    elif init == "ones":
        tensor.fill_(1)
    elif init == "kaiming":  # torch's default of nn.Linear: uniform in +-1 / sqrt(fan_in)
        torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    elif init == "normal":
        tensor.normal_(generator=generator)
