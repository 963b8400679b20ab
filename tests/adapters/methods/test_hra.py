"""HRA: the compact form is the product of reflections."""

from __future__ import annotations

import pytest
import torch

from peftcli import HRAConfig, get_peft_model
from peftcli.adapters.base import SiteShape, Tensors
from peftcli.adapters.methods.hra import Hra


def hra(r: int, **given: bool) -> Hra:
    return Hra(HRAConfig(r=r, **given), SiteShape("q", "linear", 16, 8))


@pytest.mark.parametrize("r", [1, 2, 5, 16, 40])
def test_reflections_one_by_one(r: int) -> None:
    u = torch.randn(16, r, dtype=torch.float64)
    product = torch.eye(16, dtype=torch.float64)
    for direction in (u / u.norm(dim=0)).T:
        product = product @ (torch.eye(16) - 2 * torch.outer(direction, direction))
    x = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(hra(r).before(Tensors(hra_u=u), x), x @ product.T)
    torch.testing.assert_close(product @ product.T, torch.eye(16, dtype=torch.float64))


def test_orthogonal_directions_one_by_one() -> None:
    u = torch.randn(16, 4, dtype=torch.float64)
    basis: list[torch.Tensor] = []
    for direction in u.T:
        rest = direction - sum((earlier @ direction) * earlier for earlier in basis)
        basis.append(rest / rest.norm())
    q = torch.stack(basis, 1)
    x = torch.randn(3, 16, dtype=torch.float64)
    expected = x - 2 * x @ q @ q.T
    torch.testing.assert_close(hra(4, apply_GS=True).before(Tensors(hra_u=u), x), expected)


def test_an_odd_number_of_reflections_can_not_start_as_the_identity() -> None:
    with pytest.warns(UserWarning, match="symmetric initialization can NOT"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), HRAConfig(r=3, target_modules=["0"]))
