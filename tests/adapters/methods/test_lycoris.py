"""LoHa and LoKr: dropout of rows and modules, and what 0.13.0's LoKr files mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from peftcli import LoHaConfig, LoKrConfig, PeftConfig, get_peft_model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Linear(12, 400)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site(x)


def update(config: PeftConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """What the adapter adds in evaluation and in one training pass, [rows, out]."""
    torch.manual_seed(0)
    model, x = get_peft_model(Net(), config), torch.randn(3, 12)
    with torch.no_grad():
        plain, dropped = model.eval()(x), model.train()(x)
        with model.disable_adapter():
            base = model(x)
    return plain - base, dropped - base


@pytest.mark.parametrize("method", [LoHaConfig, LoKrConfig])
def test_rank_dropout_leaves_out_whole_rows_of_the_update(method: type[PeftConfig]) -> None:
    plain, dropped = update(method(target_modules=["site"], init_weights=False, rank_dropout=0.25))
    kept = dropped.abs().amax(0) > 1e-6
    assert 0.65 < kept.float().mean() < 0.85
    scale = 1 / kept.float().mean() if method is LoHaConfig else 1.0
    torch.testing.assert_close(dropped[:, kept], plain[:, kept] * scale, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [LoHaConfig, LoKrConfig])
def test_module_dropout_leaves_out_all_of_it(method: type[PeftConfig]) -> None:
    plain, dropped = update(method(target_modules=["site"], init_weights=False, module_dropout=1.0))
    assert plain.abs().max() > 1e-2
    assert torch.equal(dropped, torch.zeros_like(dropped))


def test_lokr_files_of_0_13_have_no_scaling(tmp_path: Path) -> None:
    """PEFT 0.13 ignored alpha; a file of its says so by lacking `rank_dropout_scale`."""
    old = {"peft_type": "LOKR", "r": 4, "alpha": 8, "rank_pattern": {"site": 2}, "target_modules": ["site"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(old))
    config = LoKrConfig.from_pretrained(tmp_path)
    assert isinstance(config, LoKrConfig)
    layer = get_peft_model(Net(), config).base_model.model.site
    assert layer.scaling == {"default": 1.0}


@pytest.mark.parametrize(("alpha", "told"), [(4, False), (8, True)])
def test_lokr_says_that_scaling_counts_where_it_does(alpha: int, told: bool, tmp_path: Path) -> None:
    """0.13 refuses keys it does not know, so it never computes something else from our file."""
    LoKrConfig(r=4, alpha=alpha).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert ("rank_dropout_scale" in saved) is told
    again = LoKrConfig.from_pretrained(tmp_path)
    assert isinstance(again, LoKrConfig)
    assert (again.r, again.alpha) == (4, alpha)


@pytest.mark.parametrize("options", [{"rank_dropout": 0.1}, {"module_dropout": 0.1}])
def test_dropout_is_refused_where_it_could_not_act(options: dict[str, float]) -> None:
    model = nn.ModuleDict({"site": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match="no place for an adapter's dropout"):
        get_peft_model(model, LoHaConfig(target_modules=["site"], **options))
