"""BOFT: what the butterfly is, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftcli import BOFTConfig, PeftModel, get_peft_model
from peftcli.adapters.audit import audit_folder
from peftcli.adapters.base import SiteShape, Tensors
from peftcli.adapters.methods.boft import Boft, interleave
from peftcli.adapters.rotations import cayley
from peftcli.errors import InputError


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 8))


def boft(features: int, **given: int) -> Boft:
    return Boft(BOFTConfig(**given), SiteShape("q", "linear", features, 8))


def test_the_butterfly_is_a_product_of_permuted_block_diagonal_matrices() -> None:
    """Written out with matrices, as the paper has it: x M with M = M_2 M_1 M_0, M_i = P_i B_i P_i^T."""
    features, size, factors = 48, 4, 3
    adapter = boft(features, boft_block_size=size, boft_n_butterfly_factor=factors)
    r = torch.randn(adapter.tensors()["boft_R"].shape)
    product = torch.eye(features)
    for i in range(factors):
        blocks = torch.block_diag(*cayley((r[i] - r[i].mT) / 2))
        chunks = torch.arange(features).view(-1, 2**i, 2, size // 2)  # halves of blocks; even ones first in each run
        permutation = torch.eye(features)[chunks.transpose(1, 2).flatten()]
        product = permutation @ blocks @ permutation.T @ product
    x = torch.randn(5, features)
    torch.testing.assert_close(adapter.before(Tensors(boft_R=r), x), x @ product, atol=1e-5, rtol=1e-5)


def test_enough_factors_make_every_output_depend_on_every_input() -> None:
    adapter = boft(32, boft_block_size=4, boft_n_butterfly_factor=4)
    r = torch.randn(adapter.tensors()["boft_R"].shape)
    rotation = adapter.before(Tensors(boft_R=r), torch.eye(32))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(32), atol=1e-5, rtol=0)
    assert (rotation != 0).all()


def test_interleaving_undoes_itself() -> None:
    x = torch.arange(24.0)
    assert torch.equal(interleave(interleave(x, 2, 4, 3), 4, 2, 3), x)
    assert interleave(torch.arange(8), 2, 4, 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"boft_block_size": 0}, "boft_block_size"),
        ({"boft_block_size": 4, "boft_block_num": 4}, "boft_block_num"),
        ({"boft_block_size": 3}, "boft_block_size"),
        ({"boft_block_size": 0, "boft_block_num": 5}, "boft_block_num"),
        ({"boft_block_size": 4, "boft_n_butterfly_factor": 4}, "boft_n_butterfly_factor"),
        ({"boft_block_size": 1, "boft_n_butterfly_factor": 2}, "boft_n_butterfly_factor"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_trace(given: dict, field: str) -> None:
    model = net()
    with pytest.raises(InputError) as caught:
        get_peft_model(model, BOFTConfig(target_modules=["0"], **given))
    assert caught.value.field == field
    assert type(model[0]) is torch.nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def test_dropout_stops_a_share_of_one_factor() -> None:
    given = {"boft_block_size": 2, "boft_n_butterfly_factor": 2, "boft_dropout": 0.5, "init_weights": False}
    model = get_peft_model(net(), BOFTConfig(target_modules=["0"], **given))
    layer = model.base_model.model[0]
    for _ in range(10):
        dropped = layer.adapters["default"].dropped(layer.tensors("default")).boft_R
        stopped = (dropped == 0).flatten(2).all(2).sum(1)
        assert sorted(stopped.tolist()) == [0, 4]
    model.eval()
    x = torch.randn(3, 16)
    assert torch.equal(model(x), model(x))


def test_old_files_hold_permutations_that_nobody_needs(tmp_path: Path) -> None:
    model = get_peft_model(net(), BOFTConfig(target_modules=["0"], boft_block_size=4, init_weights=False))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.0.boft_P": torch.eye(16)[None]}, path, metadata={"format": "pt"})
    again = PeftModel.from_pretrained(net(), tmp_path)
    x = torch.randn(3, 16)
    assert torch.equal(again(x), model.eval()(x))


def test_a_file_with_one_factor_whatever_its_config_says(tmp_path: Path) -> None:
    """PEFT without its CUDA kernel makes one factor and writes the config as it was given."""
    config = BOFTConfig(boft_block_size=4, target_modules=["0"], init_weights=False)
    model = get_peft_model(net(), config).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"boft_n_butterfly_factor": 1', '"boft_n_butterfly_factor": 2'))
    x = torch.randn(3, 16)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path)(x), model(x))
    assert not audit_folder(tmp_path).errors
