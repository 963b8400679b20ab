"""Modules that share their weight: which they are, so that an adapter on one can be followed by the others."""

from __future__ import annotations

from torch import nn  # noqa: TID253

from peftcli.adapters.base import Adapter
from peftcli.adapters.sites import Site, site_for
from peftcli.errors import InputError

Planned = list[tuple[Site, Adapter]]


def followers(base: dict[str, nn.Module], planned: Planned) -> list[tuple[Site, Adapter, Site]]:
    """The sites tied to planned ones whose method follows ties: (site, its adapter, the site it follows).

    Of planned sites that are tied to each other the first leads: the others leave `planned`.

    Raises:
        InputError: a module would follow another and be adapted itself.
    """
    leaders: dict[nn.Parameter | None, tuple[Site, Adapter]] = {}
    for site, adapter in list(planned):
        if adapter.follows_ties:
            weight = site.module._parameters[site.parameter]
            if weight in leaders:
                planned.remove((site, adapter))
            leaders.setdefault(weight, (site, adapter))
    found: list[tuple[Site, Adapter, Site]] = []
    for path, module in base.items():
        tied = leaders.get(module._parameters.get("weight"))
        if tied is None or module is tied[0].module:
            continue
        leader, adapter = tied
        if any(site.module is module for site, _ in planned):
            raise InputError(
                f"is tied to {leader.name}, whose tokens are trained, and can't be adapted itself as well",
                place=path,
                field="target_modules",
                fix=f"leave {path} out, or train a head of its own with modules_to_save",
            )
        site_here = site_for(module, path)
        if site_here is not None:
            found.append((site_here, site_here.adapter(type(adapter), adapter.config), leader))
    return found
