"""SHiRA: places that a seed chooses and a file holds."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from peftcli import PeftModel, ShiraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peftcli.errors import InputError

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


def test_a_mask_of_ones_own_chooses_the_places(tmp_path: Path) -> None:
    """The largest weights: the file holds their places, so it needs no function to be read."""
    net = nn.Sequential(nn.Linear(8, 6))
    weight = net[0].weight.detach().clone()

    def largest(base_layer: nn.Module, r: int, **kwargs: object) -> torch.Tensor:
        values = base_layer.weight.abs().flatten()
        return (values >= values.topk(r * 14).values[-1]).float().reshape(base_layer.weight.shape)

    config = ShiraConfig(target_modules=["0"], r=2, mask_type="largest", init_weights=False)
    with pytest.raises(InputError, match="'largest' is no mask peftcli makes"):
        get_peft_model(copy.deepcopy(net), config)
    config.mask_fn = largest
    model = get_peft_model(copy.deepcopy(net), config)
    x = torch.randn(3, 8)
    change = model.base_model.model[0].get_delta_weight("default")
    assert torch.equal(change != 0, largest(net[0], 2) == 1)
    torch.testing.assert_close(model(x), x @ (weight + change).T + net[0].bias)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(net, tmp_path)(x), model(x))


def test_a_mask_with_another_number_of_ones_is_refused() -> None:
    config = ShiraConfig(target_modules=["0"], r=2)
    config.mask_fn = lambda layer, r, **kwargs: torch.ones_like(layer.weight)
    with pytest.raises(InputError, match="the sum 48"):
        get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)
