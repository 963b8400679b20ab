"""RoAd: each pair of outputs is turned by its own 2 x 2 matrix."""

from __future__ import annotations

import pytest
import torch

from peftcli import RoadConfig, get_peft_model
from peftcli.adapters.base import SiteShape, Tensors
from peftcli.adapters.methods.road import Road
from peftcli.errors import InputError

GROUP, OUTPUTS = 4, 8


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_pairs_are_turned_one_by_one(variant: str) -> None:
    adapter = Road(RoadConfig(variant=variant, group_size=GROUP), SiteShape("q", "linear", 3, OUTPUTS))
    p = Tensors({name: torch.randn(spec.shape) for name, spec in adapter.tensors().items()})
    y = torch.randn(2, OUTPUTS)
    result = adapter.after(p, y)

    half = GROUP // 2
    for group in range(OUTPUTS // GROUP):
        for i in range(half):
            first, second = group * GROUP + i, group * GROUP + half + i
            cos1, sin1, cos2, sin2 = _entries(variant, p, group, i)
            torch.testing.assert_close(result[:, first], y[:, first] * cos1 - y[:, second] * sin1)
            torch.testing.assert_close(result[:, second], y[:, second] * cos2 + y[:, first] * sin2)


def _entries(variant: str, p: Tensors, group: int, i: int) -> tuple[torch.Tensor, ...]:
    """a cos t and a sin t of the first and the second output of a pair."""
    half = GROUP // 2
    if variant == "road_1":
        places = [group * half + i] * 4
    elif variant == "road_2":
        places = [group * GROUP + i] * 2 + [group * GROUP + half + i] * 2
    else:  # all cosines of a group, then all its sines
        start = group * 2 * GROUP
        places = [start + i, start + GROUP + i, start + half + i, start + GROUP + half + i]
    functions = [torch.cos, torch.sin] * 2
    return tuple(p.road_alpha[n] * f(p.road_theta[n]) for n, f in zip(places, functions, strict=True))


@pytest.mark.parametrize("size", [3, 6])
def test_group_sizes_that_do_not_fit_are_refused(size: int) -> None:
    with pytest.raises(InputError) as caught:
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 8)), RoadConfig(target_modules=["0"], group_size=size))
    assert caught.value.field == "group_size"


def test_fields_that_peft_does_not_have_are_not_taken_and_not_written() -> None:
    with pytest.raises(InputError, match="no such field"):
        RoadConfig(target_modules=["0"], layers_to_transform=[1]).validate()
    with pytest.raises(InputError, match="unknown field"):
        RoadConfig.from_dict({"layers_to_transform": [1]})
    assert not RoadConfig.absent & set(RoadConfig().to_saved_dict())
