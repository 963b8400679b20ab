"""Adapters of fused experts: merged with each other and written as LoRA, expert by expert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from merging.lab import assert_same, deltas, save_adapter, total
from merging.mixtures import EXPERTS, PATTERNS, save_mixture

from peftcli.errors import InputError
from peftcli.export.gguf import export_gguf
from peftcli.export.lora import export_lora, export_peft
from peftcli.merging.algebra import Rank
from peftcli.merging.merge import merge_adapters
from peftcli.merging.operators import OPERATORS, Settings
from peftcli.merging.settings import MergeSettings


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; a: both parameters, patterns, a linear layer; b: both, rsLoRA; c: one of them."""
    folder = tmp_path_factory.mktemp("experts")
    base = save_mixture(folder / "base", "gpt_oss")
    both = {"target_parameters": EXPERTS}
    save_adapter(folder / "a", base, r=2, lora_alpha=3, seed=1, target_modules=["q_proj"], **both, **PATTERNS)
    save_adapter(folder / "b", base, r=4, use_rslora=True, seed=2, target_modules=[], **both)
    save_adapter(folder / "c", base, r=1, seed=3, target_modules=["o_proj"], target_parameters=EXPERTS[1:])
    return folder


def merged(place: Path, names: str, out: Path, **settings: object) -> dict[str, torch.Tensor]:
    merge_adapters([place / name for name in names.split()], out, MergeSettings(**settings))  # type: ignore[arg-type]
    return deltas(place / "base", out)


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_the_sum_is_exact(place: Path, tmp_path: Path, method: str) -> None:
    weights = (0.5, -1.5, 2.0)
    parts = [deltas(place / "base", place / name) for name in "abc"]
    assert sum(part.dim() == 3 for part in parts[0].values()) == 4
    found = merged(place, "a b c", tmp_path / "m", method=method, weights=weights)
    assert_same(found, total(*zip(weights, parts, strict=True)), atol=1e-5)


def test_pruning_sees_each_expert(place: Path, tmp_path: Path) -> None:
    parts = [deltas(place / "base", place / name) for name in "bc"]
    found = merged(place, "b c", tmp_path / "m", method="ties", density=(0.4, 0.6), rank=Rank(number=16))
    name = "model.layers.1.mlp.experts"  # the outer one of two: down_proj
    pairs = zip(parts[0][name], parts[1][name], strict=True)
    wanted = torch.stack([OPERATORS["ties"](pair, (1.0, 1.0), Settings((0.4, 0.6))) for pair in pairs])
    torch.testing.assert_close(found[name], wanted, atol=1e-5, rtol=0)


def test_the_report_counts_all_experts(place: Path, tmp_path: Path) -> None:
    report = merge_adapters([place / "b", place / "c"], tmp_path / "m", MergeSettings(rank=Rank(number=2)))
    row = next(row for row in report.modules if row.module == "model.layers.0.mlp.experts.down_proj")
    path = "model.layers.0.mlp.experts"
    parts = [deltas(place / "base", place / name)[path] for name in "bc"]
    assert row.parents == pytest.approx([float(torch.linalg.norm(part)) for part in parts], rel=1e-4)
    assert row.norm == pytest.approx(float(torch.linalg.norm(sum(parts))), rel=1e-4)
    kept = torch.linalg.norm(deltas(place / "base", tmp_path / "m")[path]) ** 2 / row.norm**2
    assert row.energy == pytest.approx(float(kept), abs=1e-4)
    assert row.rank == 2 and row.energy < 0.99


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_as_lora(place: Path, tmp_path: Path, name: str) -> None:
    wanted = deltas(place / "base", place / name)
    assert export_lora(place / name, tmp_path / "l", portable=False).is_exact
    assert_same(deltas(place / "base", tmp_path / "l"), wanted, atol=1e-5)
    assert export_peft(place / name, tmp_path / "p").modules == len(wanted)
    assert_same(deltas(place / "base", tmp_path / "p"), wanted)


def test_refusals(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="few programs read"):
        export_lora(place / "a", tmp_path / "p", portable=True)
    other = save_mixture(tmp_path / "other", "mixtral")
    save_adapter(tmp_path / "x", other, r=1, target_modules=[], target_parameters=EXPERTS)
    with pytest.raises(InputError, match="mixtral"):
        export_gguf(tmp_path / "x", other, tmp_path / "p")
    with pytest.raises(InputError, match="space delta"):
        merge_adapters([place / "b", place / "b"], tmp_path / "p", MergeSettings(space="factors"))
    with pytest.raises(InputError, match="different bases"):
        merge_adapters([place / "b", tmp_path / "x"], tmp_path / "p", MergeSettings())
    assert not (tmp_path / "p").exists()
