"""`add_weighted_adapter`: a new adapter beside its parents, in PEFT's factor space (A and B are merged, not B A).

`linear` on the factors is not the sum of the updates: (A1 + A2, B1 + B2) has cross terms (peft#3004). It is kept because
people rely on it; `cat` and the `svd` types are exact sums. Where PEFT gets scalings wrong (rsLoRA, patterns, twice in
`svd` before 0.21) this is right. `peft merge` merges files, in delta space by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253

from peftcli.adapters.attach import attach
from peftcli.adapters.engine import Attached
from peftcli.adapters.layer import AdapterLayer
from peftcli.adapters.methods.lora import Lora, LoraConfig
from peftcli.adapters.methods.lora_variants import VARIANTS
from peftcli.errors import InputError
from peftcli.merging.factors import combine_factors
from peftcli.merging.operators import COMBINATION_TYPES, OPERATORS, SVD_TYPES, Settings, SignMethod


@dataclass(frozen=True)
class Svd:
    """How the types ending in `svd` come back to factors.

    Attributes:
        rank: of the new adapter; None takes the largest of the parents.
        clamp: quantile the factors are clamped at.
        driver: LAPACK routine, passed to `torch.linalg.svd`.
    """

    rank: int | None = None
    clamp: float | None = None
    driver: str | None = None


def add_weighted_lora(
    attached: Attached,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    svd: Svd,
    density: float | None,
    majority_sign_method: SignMethod,
) -> None:
    """Attach a frozen LoRA adapter that combines others of the same model.

    Raises:
        InputError: for an unknown parent or type, parents whose ranks differ where the type needs equal ones, and
            parents with more than A and B (DoRA, `lora_bias`, modules_to_save), which factors can't express.
    """
    if adapter_name in attached.configs:
        return
    configs = [_config(attached, name) for name in adapters]
    kind = "linear" if len(adapters) == 1 else combination_type
    _check(configs, adapters, weights, kind, density)
    settings = Settings([density] * len(adapters) if density is not None else (), majority_sign_method)
    made = {
        path: _combine(layer, list(zip(adapters, weights, strict=True)), kind, svd, settings)
        for path, layer in attached.layers()
        if any(name in layer.adapters for name in adapters)
    }
    ranks = {layer.site.name: made[path][0].shape[0] for path, layer in attached.layers() if path in made}
    attach(attached.root, _merged_config(configs, ranks), adapter_name, initialize=False)
    with torch.no_grad():
        for path, layer in attached.layers():
            if adapter_name in layer.adapters:
                a, b = cast(Lora, layer.adapters[adapter_name]).pair(layer.tensors(adapter_name))
                a.copy_(made[path][0].reshape(a.shape))
                b.copy_(made[path][1].reshape(b.shape))


def _config(attached: Attached, name: str) -> LoraConfig:
    if name not in attached.configs:
        raise InputError(f"Adapter {name} does not exist", allowed=", ".join(attached.configs))
    return cast(LoraConfig, attached.configs[name])


def _check(
    configs: list[LoraConfig], adapters: Sequence[str], weights: Sequence[float], kind: str, density: float | None
) -> None:
    if kind not in COMBINATION_TYPES:
        raise InputError(f"Invalid combination_type: {kind}", allowed=", ".join(COMBINATION_TYPES))
    if len(weights) != len(adapters):
        raise InputError(f"{len(adapters)} adapters need as many weights, not {len(weights)}", field="weights")
    if not configs:
        raise InputError("no adapters to combine", field="adapters", allowed="names of adapters of this model")
    if len(configs) > 1 and any(config.modules_to_save for config in configs):
        raise InputError("Cannot add weighted adapters if they target the same module with modules_to_save")
    for name, config in zip(adapters, configs, strict=True):
        whole = config.variant and config.variant != "alora_invocation_tokens"
        if config.lora_bias or (config.variant and not (whole and kind in SVD_TYPES)):
            what = "lora_bias" if config.lora_bias else "DoRA magnitudes" if config.use_dora else config.variant
            raise InputError(
                f"adapter {name} has {what}, which is lost when only A and B are merged",
                fix="combination_type='svd' merges whole updates" if whole else None,
            )
    if density is None and any(word in kind for word in ("ties", "dare", "prune")):
        raise InputError(f"{kind} needs a density", field="density", allowed="0 to 1")
    if len({isinstance(config.target_modules, str) for config in configs}) > 1:
        raise InputError(
            "all adapter configs should follow the same target modules type. Combining adapters with `target_modules` "
            "type being a mix of list/set and string is not supported."
        )


def _merged_config(configs: list[LoraConfig], ranks: dict[str, int]) -> LoraConfig:
    """r = alpha everywhere, so the scaling is 1 whatever the parents' was."""
    targets: Any
    if isinstance(configs[0].target_modules, str):
        targets = "|".join(f"({config.target_modules})" for config in configs)
    else:
        targets = {name for config in configs for name in cast(Any, config.target_modules)}
    r = max(ranks.values())
    other = {module: rank for module, rank in ranks.items() if rank != r}
    return replace(
        configs[0],
        r=r,
        lora_alpha=r,
        target_modules=targets,
        rank_pattern=other,
        alpha_pattern=dict(other),
        use_rslora=False,
        **{name: getattr(LoraConfig(), name) for name in VARIANTS},
        init_lora_weights=True,
    )


def _combine(
    layer: AdapterLayer, parents: list[tuple[str, float]], kind: str, svd: Svd, settings: Settings
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of the new adapter at one module, scaling 1. Parents that are not there are left out."""
    here = [index for index, (name, _) in enumerate(parents) if name in layer.adapters]
    parents = [parents[index] for index in here]
    if settings.density:
        settings = replace(settings, density=[settings.density[index] for index in here])
    with torch.no_grad():
        if kind in SVD_TYPES:
            return _by_svd(layer, parents, OPERATORS[SVD_TYPES[kind]], svd, settings)
        return _by_factors(layer, parents, kind, settings)


def _by_factors(
    layer: AdapterLayer, parents: list[tuple[str, float]], kind: str, settings: Settings
) -> tuple[Tensor, Tensor]:
    factors, scalings = [], []
    for name, weight in parents:
        adapter = cast(Lora, layer.adapters[name])
        a, b = adapter.factors(layer.tensors(name))
        factors.append((a.detach(), b.detach() / adapter.scaling))
        scalings.append(weight * adapter.scaling)
    return combine_factors(factors, scalings, kind, settings, place=layer.site.name)


def _by_svd(
    layer: AdapterLayer, parents: list[tuple[str, float]], operator: Any, svd: Svd, settings: Settings
) -> tuple[Tensor, Tensor]:
    deltas = [cast(Lora, layer.adapters[name]).delta(layer.tensors(name)).float() for name, _ in parents]
    merged = operator(deltas, [weight for _, weight in parents], settings)
    adapters = [cast(Lora, layer.adapters[name]) for name, _ in parents]  # with a rank of their own here, or not
    rank = svd.rank or max(r for adapter in adapters for r in (adapter.r, adapter.config.r))
    u, s, vh = torch.linalg.svd(merged, full_matrices=False, driver=svd.driver)
    rank = min(rank, s.numel())
    b, a = u[:, :rank] * s[:rank], vh[:rank]
    if svd.clamp is not None:
        limit = torch.quantile(torch.cat([b.flatten(), a.flatten()]), svd.clamp)
        a, b = a.clamp(-limit, limit), b.clamp(-limit, limit)
    return a, b


def add_weighted_ia3(attached: Attached, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Attach a frozen IA3 adapter whose vectors are the weighted sum of others'.

    Raises:
        InputError: for an unknown parent, or parents that adapt different modules.
    """
    if adapter_name in attached.configs:
        return
    configs: list[Any] = [_config(attached, name) for name in adapters]
    for field in ("target_modules", "feedforward_modules"):
        if any(getattr(config, field) != getattr(configs[0], field) for config in configs):
            raise InputError(f"all IA3 adapters must have the same {field}", field=field)
    if len(weights) != len(adapters):
        raise InputError(f"{len(adapters)} adapters need as many weights, not {len(weights)}", field="weights")
    attach(attached.root, replace(configs[0]), adapter_name)
    with torch.no_grad():
        for _, layer in attached.layers():
            if adapter_name in layer.adapters:
                parents = [layer.tensors(name)["ia3_l"] for name in adapters]
                layer.tensors(adapter_name)["ia3_l"].copy_(OPERATORS["linear"](parents, weights, Settings()))
