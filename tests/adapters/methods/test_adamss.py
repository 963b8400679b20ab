"""AdaMSS: the subspaces no file holds are found again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peftcli import AdamssConfig, get_peft_model
from peftcli.adapters.clusters import k_means
from peftcli.errors import InputError


def test_k_means_gives_scikit_learns_groups() -> None:
    """Recorded from scikit-learn 1.9.1: KMeans(4, init="random", n_init=1, max_iter=10, random_state=123456789)."""
    numbers = torch.arange(24.0)
    points = torch.stack([torch.sin(numbers * 1.7), torch.cos(numbers * 0.9), (numbers % 5) / 5], dim=1)
    assert k_means(points, 4, steps=10, seed=123456789).tolist() == [
        2,
        2,
        1,
        1,
        0,
        0,
        3,
        3,
        2,
        0,
        1,
        1,
        0,
        3,
        3,
        2,
        0,
        1,
        1,
        0,
        2,
        3,
        3,
        0,
    ]


@pytest.mark.parametrize(("threshold", "rank"), [(1.0, 1), (1e-9, 3)])
def test_dynamic_ranks_count_large_singular_values(threshold: float, rank: int) -> None:
    torch.manual_seed(0)
    options = {"r": 8, "num_subspaces": 2, "subspace_rank": 3, "use_dynamic_rank": True, "svd_threshold": threshold}
    model = get_peft_model(nn.Sequential(nn.Linear(24, 16)), AdamssConfig(target_modules=["0"], **options))
    p = next(layer for _, layer in model.base_model.attached.layers()).tensors("default")
    assert [tuple(p[f"adamss_A.{group}"].shape) for group in range(2)] == [(rank, 8), (rank, 8)]


def test_rows_that_are_all_equally_far_apart_are_told() -> None:
    """An orthogonal matrix's are: there rounding decides."""
    net = nn.Sequential(nn.Linear(16, 8))
    with pytest.warns(UserWarning, match=r"r reaches the number of outputs of 0 \(1 such modules\)"):
        get_peft_model(net, AdamssConfig(target_modules=["0"], r=8, num_subspaces=2))


def test_rows_that_are_all_alike_are_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 6, bias=False))
    nn.init.ones_(net[0].weight)
    with pytest.raises(InputError, match="fewer than 3 subspaces"):
        get_peft_model(net, AdamssConfig(target_modules=["0"], r=1, num_subspaces=3))


def test_allocating_subspaces_while_training_is_refused() -> None:
    with pytest.raises(InputError, match="use_asa"):
        get_peft_model(nn.Sequential(nn.Linear(8, 6)), AdamssConfig(target_modules=["0"], use_asa=True))
