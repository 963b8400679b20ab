"""WaveFT: its filters are wavelets, and coefficients are shared out by size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from peftcli import WaveFTConfig, get_peft_model
from peftcli.adapters.wavelets import low_pass

NAMES = [*(f"db{n}" for n in range(1, 11)), *(f"sym{n}" for n in range(2, 11)), "coif1", "coif2", "coif3"]


@pytest.mark.parametrize("name", NAMES)
def test_a_filter_is_orthogonal_to_its_even_shifts_and_has_its_moments(name: str) -> None:
    low = torch.tensor(low_pass(name), dtype=torch.float64)
    number = int(name.strip("dbsymcoif"))
    assert len(low) == (6 if name.startswith("coif") else 2) * number
    assert low.sum().item() == pytest.approx(math.sqrt(2), abs=1e-9)
    for shift in range(0, len(low), 2):
        assert (low[shift:] @ low[: len(low) - shift]).item() == pytest.approx(float(shift == 0), abs=1e-9)
    high = low.flip(0) * torch.tensor([1, -1], dtype=torch.float64).repeat(len(low) // 2)
    places = torch.linspace(-1, 1, len(low), dtype=torch.float64)
    for power in range((2 if name.startswith("coif") else 1) * number):
        assert (high @ places**power).item() == pytest.approx(0, abs=1e-8)


def test_filters_are_those_of_pywavelets() -> None:
    """Recorded from PyWavelets: rec_lo."""
    assert low_pass("sym4")[:4] == pytest.approx([0.0322231006, -0.01260396726, -0.09921954358, 0.2978577956])
    assert low_pass("sym5")[:3] == pytest.approx([0.01953888274, -0.02110183402, -0.1753280899])
    assert low_pass("db2") == pytest.approx([0.482962913145, 0.836516303737, 0.224143868042, -0.129409522551])


def test_coefficients_are_shared_out_by_size() -> None:
    """An independent count: round(share * n * modules), at least one, whatever the pattern says."""
    net = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 6), nn.Linear(6, 1))
    config = WaveFTConfig(target_modules=["0", "1", "2"], n_frequency=20, proportional_parameters=True)
    config.n_frequency_pattern = {"0": 3}
    model = get_peft_model(net, config)
    counts = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert list(counts.values()) == [52, 8, 1]  # 60 * 1200 / 1386, 60 * 180 / 1386, 60 * 6 / 1386 = 0.26
