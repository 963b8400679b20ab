"""EVA: A starts at the principal components of the layer's inputs, and ranks go where they explain most variance
(Paischer et al. 2024, arXiv 2410.07170). B starts at zero, so the base is untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, cast

from annotated_types import Ge, Gt, Le

from peftcli.adapters.initializers.observe import evaluating, inputs_seen, linear_sites
from peftcli.errors import InputError
from peftcli.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peftcli.adapters.methods.lora import LoraConfig


@dataclass
class EvaConfig:
    """How EVA looks at the inputs and deals out ranks.

    Attributes:
        rho: a layer gets at most rho * r; 1 keeps all ranks equal.
        tau: cosine similarity of components between batches at which a layer has converged.
        use_label_mask: look at labelled positions only.
        label_mask_value: the label of the others.
        whiten: divide components by the root of their singular values.
        adjust_scaling_factors: change alpha with the rank, so that the scaling stays.
    """

    rho: Annotated[float, Ge(1)] = 2.0
    tau: Annotated[float, Gt(0), Le(1)] = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True


@dataclass
class IncrementalPCA:
    """Principal components of rows that come in batches (Ross et al. 2008): the mean is corrected as it moves."""

    count: int
    seen: int = 0
    mean: Tensor | None = None
    singular_values: Tensor | None = None
    components: Tensor | None = None
    square_sum: float = 0.0
    similarity: float = 0.0

    def update(self, rows: Tensor) -> None:
        """Take in rows [n, in]; too few for the components are left out."""
        if len(rows) < self.count:
            return
        mean, total = rows.mean(0), self.seen + len(rows)
        stacked = [rows - mean]
        if self.components is not None and self.mean is not None and self.singular_values is not None:
            shift = (self.seen * len(rows) / total) ** 0.5 * (self.mean - mean)
            stacked = [self.singular_values[:, None] * self.components, rows - mean, shift[None]]
            mean = (self.seen * self.mean + len(rows) * mean) / total
        _, s, vh = torch.linalg.svd(torch.cat(stacked), full_matrices=False)
        previous = self.components
        self.components, self.singular_values = vh[: self.count], s[: self.count]
        self.mean, self.seen = mean, total
        self.square_sum = float((s**2).sum())
        if previous is not None:
            self.similarity = float((previous * self.components).sum(1).abs().min())

    def explained_variance_ratio(self) -> Tensor:
        assert self.singular_values is not None
        return self.singular_values**2 / self.square_sum


def get_eva_state_dict(
    model: Any,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    adapter_name: str = "default",
) -> dict[str, Tensor]:
    """The components A [r, in] begins at, by module; r is the rank EVA deals to it.

    Args:
        model: a PeftModel, or with `peft_config` the bare model.
        dataloader: batches that show what the model will see; a mapping is passed as keyword arguments.
        peft_config: the config of the adapter to come; that of `adapter_name` by default.
        forward_fn: how a batch is passed through the model.
        adapter_name: the adapter.
    """
    from peftcli.adapters.engine import adapters_of, attached_to, user_model

    if peft_config is None:
        peft_config = cast("LoraConfig", adapters_of(model).configs[adapter_name])
    attached = attached_to(user_model(model))
    with attached.switched_off() if attached else nullcontext():
        started = eva_start(user_model(model), replace(peft_config), dataloader, forward_fn)
    return {name: a for name, (a, _) in started.prepared.items()}


def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    adapter_name: str = "default",
) -> None:
    """Start a LoRA adapter made with `init_lora_weights="eva"` from data; its ranks are dealt out anew.

    Args:
        model: a PeftModel.
        dataloader: batches that show what the model will see; a mapping is passed as keyword arguments.
        eva_state_dict: what `get_eva_state_dict` gave, instead of data.
        forward_fn: how a batch is passed through the model.
        adapter_name: the adapter.
    """
    from peftcli.adapters.attach import attach
    from peftcli.adapters.engine import adapters_of

    attached = adapters_of(model)
    config: Any = attached.configs[adapter_name]
    if config.init_lora_weights != "eva":
        raise InputError("the adapter was not made with init_lora_weights='eva'", field="init_lora_weights")
    others = [name for name in attached.configs if name != adapter_name]
    if others:
        raise InputError("EVA starts a model's only adapter", fix=f"delete {', '.join(others)} first")
    if (dataloader is None) == (eva_state_dict is None):
        raise InputError("either `dataloader` or `eva_state_dict` says how the adapter starts", field="dataloader")
    model.base_model.delete_adapter(adapter_name)
    if eva_state_dict is not None:
        ranks = {name: adapter.r for name, (_, adapter) in linear_sites(attached.root, config, purpose="EVA").items()}  # type: ignore[attr-defined]
        started = _started(config, ranks, eva_state_dict)
    else:
        started = eva_start(attached.root, config, dataloader or (), forward_fn)
    attach(attached.root, started, adapter_name)


def eva_start(
    model: nn.Module,
    config: LoraConfig,
    batches: Iterable[Any],
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
) -> LoraConfig:
    """The config with ranks dealt out and each layer's A prepared; modules left with rank 0 are not adapted."""
    settings: Any = config.eva_config or EvaConfig()
    sites = linear_sites(model, config, purpose="EVA")
    ranks = {name: adapter.r for name, (_, adapter) in sites.items()}  # type: ignore[attr-defined]
    found = {name: IncrementalPCA(round(r * settings.rho)) for name, r in ranks.items()}
    rows: Tensor | None = None

    def see(name: str, x: Tensor) -> None:
        found[name].update(x if rows is None or len(rows) != len(x) else x[rows])

    run = forward_fn or (lambda model, batch: model(**batch) if isinstance(batch, dict) else model(batch))
    with evaluating(model), inputs_seen({name: site.module for name, (site, _) in sites.items()}, see):
        for batch in batches:
            labels = batch.get("labels") if isinstance(batch, dict) and settings.use_label_mask else None
            rows = None if labels is None else (labels != settings.label_mask_value).flatten()
            run(model, batch)
            if all(pca.similarity >= settings.tau for pca in found.values()):
                break
    if short := [name for name, pca in found.items() if pca.components is None]:
        raise InputError(f"too few inputs for {found[short[0]].count} components", place=short[0], field="eva_config")
    return _dealt(config, ranks, found)


def _dealt(config: LoraConfig, ranks: dict[str, int], found: dict[str, IncrementalPCA]) -> LoraConfig:
    """Give the budget of ranks to the components that explain most, over all layers."""
    settings: Any = config.eva_config or EvaConfig()
    scored = [(float(ratio), name) for name, pca in found.items() for ratio in pca.explained_variance_ratio()]
    best = sorted(scored, key=lambda item: -item[0])[: sum(ranks.values())]
    dealt = {name: sum(1 for _, owner in best if owner == name) for name in ranks}
    kept = {name: rank for name, rank in dealt.items() if rank}
    starts = {}
    for name, rank in kept.items():
        pca = found[name]
        assert pca.components is not None and pca.singular_values is not None
        a = pca.components[:rank]
        starts[name] = a / pca.singular_values[:rank].sqrt()[:, None] if settings.whiten else a
    return _started(config, ranks, starts)


def _started(config: LoraConfig, ranks: dict[str, int], starts: dict[str, Tensor]) -> LoraConfig:
    """The config of an adapter whose A begin as they are given, with the ranks they have instead of `ranks`."""
    settings: Any = config.eva_config or EvaConfig()
    if unknown := sorted(starts.keys() - ranks.keys()):
        raise InputError(f"{unknown[0]} is no module of the adapter", field="eva_state_dict")
    kept = {name: len(a) for name, a in starts.items()}
    alphas = {}
    for name, rank in kept.items():
        ratio = rank / ranks[name]
        alphas[name] = config.lora_alpha * (ratio**0.5 if config.use_rslora else ratio)
    new = replace(
        config,
        target_modules=set(kept),
        rank_pattern=kept,
        alpha_pattern=alphas if settings.adjust_scaling_factors else dict(config.alpha_pattern),
    )
    new.prepared = {name: (a, None) for name, a in starts.items()}
    return new
