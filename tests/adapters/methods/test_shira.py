"""SHiRA: places that a seed chooses and a file holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peftcli import ShiraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

KEY = "base_model.model.site.shira_indices"


def places(**options: object) -> torch.Tensor:
    model = get_peft_model(
        nn.ModuleDict({"site": nn.Linear(12, 8)}), ShiraConfig(target_modules=["site"], r=2, **options)
    )
    return get_peft_model_state_dict(model)[KEY]


def test_places_are_different_ones_and_follow_the_seed() -> None:
    found = places(random_seed=1)
    assert len({(row, column) for row, column in found.T.tolist()}) == found.shape[1] == 2 * (12 + 8)
    assert torch.equal(found, places(random_seed=1))
    assert not torch.equal(found, places(random_seed=2))
    assert torch.equal(places(), places())


@pytest.mark.parametrize("place", [(8, 0), (0, 12), (-1, 0)])
def test_places_outside_of_the_weight_are_refused(place: tuple[int, int]) -> None:
    model = get_peft_model(nn.ModuleDict({"site": nn.Linear(12, 8)}), ShiraConfig(target_modules=["site"], r=2))
    state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    state[KEY][:, 0] = torch.tensor(place)
    with pytest.raises(ValueError, match="places outside of the weight"):
        set_peft_model_state_dict(model, state)
