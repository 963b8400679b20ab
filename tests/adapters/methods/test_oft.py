"""OFT: which of the two formats a config means, and what the rotations promise."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from peftcli import OFTConfig, get_peft_model
from peftcli.adapters.config import read_config
from peftcli.adapters.registry import adapter_class
from peftcli.adapters.rotations import cayley, cayley_neumann, rotate_blocks, unpack_skew, within_ball
from peftcli.errors import InputError


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "Oft"),
        ({"oft_block_size": 16}, "Oft"),
        ({"r": 8, "oft_block_size": 0}, "Oft"),
        ({"r": 0, "oft_block_size": 16, "use_cayley_neumann": False}, "Oft"),
        ({"r": 8}, "OutputOft"),
        ({"r": 8, "rank_pattern": {"q": 2}, "block_share": True}, "OutputOft"),
    ],
)
def test_the_fields_tell_the_format(given: dict, name: str) -> None:
    config = OFTConfig(target_modules=["q"], **given)
    config.validate()
    assert adapter_class(config).__name__ == name
    again = OFTConfig.from_dict({key: value for key, value in config.to_saved_dict().items() if key != "peft_type"})
    assert adapter_class(again).__name__ == name


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"r": 8, "oft_block_size": 4}, "oft_block_size"),
        ({"r": 0, "oft_block_size": 0}, "oft_block_size"),
        ({"r": 0}, "r"),
        ({"r": 8, "bias": "all"}, "bias"),
        ({"r": 8, "use_cayley_neumann": True}, "use_cayley_neumann"),
        ({"oft_block_size": 8, "rank_pattern": {"q": 2}}, "rank_pattern"),
    ],
)
def test_mixed_formats_are_refused(given: dict, field: str) -> None:
    with pytest.raises(InputError) as caught:
        OFTConfig(**given).validate()
    assert caught.value.field == field


def test_each_format_is_written_as_its_peft_reads_it() -> None:
    old = OFTConfig(r=8).to_saved_dict()
    assert not {"oft_block_size", "bias", "use_cayley_neumann", "peft_version", "fan_in_fan_out"} & set(old)
    new = OFTConfig().to_saved_dict()
    assert (new["r"], new["oft_block_size"], new["use_cayley_neumann"]) == (0, 32, True)


def test_files_older_than_the_version_key_keep_their_series(tmp_path: Path) -> None:
    values = {"peft_type": "OFT", "oft_block_size": 4, "use_cayley_neumann": True, "inference_mode": True}
    for version, halved in ((None, False), ("0.17.1", False), ("0.18.0", True), ("0.21.3.dev0@abc", True)):
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(values | ({"peft_version": version} if version else {})))
        config = read_config(path)
        assert config.last_is_halved is halved
        config.save_pretrained(tmp_path)
        assert read_config(path).last_is_halved is halved


def test_cayley_gives_rotations() -> None:
    skew = unpack_skew(torch.randn(3, 28), 8)
    assert torch.equal(skew, -skew.mT)
    rotation = cayley(skew)
    identity = torch.eye(8).expand(3, 8, 8)
    torch.testing.assert_close(rotation @ rotation.mT, identity, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(3))
    assert torch.equal(cayley(torch.zeros(3, 8, 8)), identity)
    assert cayley(skew.to(torch.bfloat16)).dtype == torch.bfloat16


def test_the_series_approaches_the_inverse() -> None:
    skew = unpack_skew(torch.randn(2, 6, dtype=torch.float64) * 0.03, 4)
    exact = cayley(-skew)
    errors = [(cayley_neumann(skew, terms) - exact).abs().max() for terms in (1, 2, 4, 6, 8)]
    assert all(later < 0.2 * earlier for earlier, later in pairwise(errors))
    cubed = skew @ skew @ skew
    torch.testing.assert_close(cayley_neumann(skew, 4, last_is_halved=False) - cayley_neumann(skew, 4), cubed)


def test_blocks_are_a_block_diagonal_matrix() -> None:
    x, blocks = torch.randn(2, 5, 12), torch.randn(3, 4, 4)
    torch.testing.assert_close(rotate_blocks(x, blocks), x @ torch.block_diag(*blocks))
    torch.testing.assert_close(rotate_blocks(x, blocks[:1]), x @ torch.block_diag(*[blocks[0]] * 3))


def test_the_ball_has_a_gradient_at_its_centre() -> None:
    blocks = torch.stack([torch.zeros(3, 3), torch.randn(3, 3) * 0.01, torch.randn(3, 3)]).requires_grad_()
    inside = within_ball(blocks, 0.3)
    assert torch.equal(inside[:2], blocks[:2])
    torch.testing.assert_close(inside[2].norm(), torch.tensor(0.3 / 3**0.5))
    inside.sum().backward()
    assert torch.equal(
        blocks.grad, torch.ones_like(blocks)
    )  # as if the parameters had been projected before, as in PEFT


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = torch.nn.Linear(16, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x)


@pytest.mark.parametrize("given", [{"oft_block_size": 4}, {"r": 4}])
def test_constrained_oft_leaves_its_parameters_alone(given: dict) -> None:
    model = get_peft_model(Net(), OFTConfig(target_modules=["q"], coft=True, eps=1e-4, init_weights=False, **given))
    before = {name: p.clone() for name, p in model.named_parameters()}
    model(torch.randn(2, 16)).sum().backward()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(("given", "count"), [({"oft_block_size": 4}, 2), ({"r": 4}, 0)])
def test_dropped_blocks_turn_nothing(given: dict, count: int) -> None:
    """Today's: a share of the blocks is the identity; 0.13's: all of the adapter, with that probability."""
    base = Net()
    bare = torch.nn.Linear(16, 24)
    bare.load_state_dict(base.q.state_dict())
    model = get_peft_model(base, OFTConfig(target_modules=["q"], module_dropout=0.5, init_weights=False, **given))
    x = torch.eye(16)
    unchanged = [(model(x) - bare(x)).abs().amax(1).unflatten(0, (-1, 4)).amax(1) < 1e-5 for _ in range(40)]
    shares = {int(blocks.sum()) for blocks in unchanged}
    assert shares == ({count} if count else {0, 4})
    model.eval()
    assert torch.equal(model(x), model(x))


def test_a_block_size_that_does_not_fit_is_adjusted_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"Invalid `oft_block_size` \(6\)! Adjusted `oft_block_size` to \(4\)"):
        model = get_peft_model(Net(), OFTConfig(target_modules=["q"], oft_block_size=6))
    assert model.base_model.model.q.oft_R["default"].weight.shape == (4, 6)
