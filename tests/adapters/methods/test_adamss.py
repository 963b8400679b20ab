"""AdaMSS: the subspaces no file holds are found again."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from peftcli import AdamssConfig, PeftModel, get_peft_model
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


def test_subspaces_rest_as_the_schedule_says(tmp_path: Path) -> None:
    """Against the rule written out here, over the steps of AdamW, whose momentum and decay must not move what rests."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9))
    schedule = {"init_warmup": 2, "final_warmup": 8, "mask_interval": 2, "asa_target_subspaces": 2}
    betas = {"asa_importance_beta": 0.7, "asa_uncertainty_beta": 0.6, "asa_schedule_exponent": 1.0}
    config = AdamssConfig(target_modules=["0", "2"], r=6, num_subspaces=3, init_weights=False, use_asa=True)
    model = get_peft_model(copy.deepcopy(net), dataclasses.replace(config, **schedule, **betas))
    names = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    pairs = [(name, name.replace("adamss_A", "adamss_B")) for name in names if "adamss_A" in name]
    assert len(pairs) == 6
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([parameters[name] for name in names], lr=0.05, weight_decay=0.1)
    smooth = {name: [torch.zeros_like(parameters[name]) for _ in range(2)] for name in names}
    trained, rested = set(pairs), {}
    for step in range(1, 12):
        optimizer.zero_grad()
        model(torch.randn(5, 12)).square().mean().backward()
        optimizer.step()
        for pair in trained if 2 <= step <= 8 else ():
            for name in pair:
                now = (parameters[name] * parameters[name].grad).abs().detach()
                importance, uncertainty = smooth[name]
                smooth[name] = [0.7 * importance + 0.3 * now, 0.6 * uncertainty + 0.4 * (now - importance).abs()]
        if 2 <= step <= 8 and step % 2 == 0:
            count = int(2 + 4 * (1 - (step - 2) / 6))
            scores = {pair: sum((smooth[n][0] * smooth[n][1]).mean().item() for n in pair) for pair in trained}
            trained = set(sorted(trained, key=lambda pair: -scores[pair])[:count])
            rested |= {
                n: parameters[n].detach().clone() for p in pairs if p not in trained for n in p if n not in rested
            }
            smooth = {name: [torch.zeros_like(parameters[name]) for _ in range(2)] for name in names}
        model.base_model.update_and_allocate(step)
        assert all(torch.equal(parameters[name], value) for name, value in rested.items())
    assert len(trained) == 2
    assert len(rested) == 8
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 12)
    again = PeftModel.from_pretrained(net, tmp_path, is_trainable=True)
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"asa_target_subspaces": 0}, "asa_target_subspaces: must be at least 1"),
        ({"mask_interval": 0}, "mask_interval: must be at least 1"),
        ({"init_warmup": 9, "final_warmup": 9}, "final_warmup: 9 is not after init_warmup"),
    ],
)
def test_a_schedule_that_chooses_nothing_is_refused(fields: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        get_peft_model(nn.Sequential(nn.Linear(8, 6)), AdamssConfig(target_modules=["0"], use_asa=True, **fields))
