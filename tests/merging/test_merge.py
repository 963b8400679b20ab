"""Identities a merge must keep, against updates computed by live models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merging.lab import assert_same, deltas, load, load_base, logits, save_adapter, save_base, total
from safetensors.torch import load_file, save_file

from peftcli.errors import InputError
from peftcli.export.lora import export_lora
from peftcli.merging.algebra import Rank
from peftcli.merging.merge import merge_adapters
from peftcli.merging.operators import COMBINATION_TYPES, OPERATORS, SVD_TYPES, Settings
from peftcli.merging.report import MergeReport
from peftcli.merging.settings import MergeSettings

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; a: LoRA; b: rsLoRA of another rank and other targets; c: patterns; loha, ia3_0, ia3_1."""
    folder = tmp_path_factory.mktemp("merge")
    root = save_base(folder / "base")
    save_adapter(folder / "a", root, r=4, lora_alpha=8, seed=1)
    save_adapter(folder / "b", root, r=3, lora_alpha=6, use_rslora=True, target_modules=["v_proj", "down_proj"], seed=2)
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5}}
    save_adapter(folder / "c", root, r=4, lora_alpha=4, seed=3, **patterns)
    save_adapter(folder / "d", root, r=4, lora_alpha=12, seed=4)
    save_adapter(folder / "loha", root, "LOHA", r=2, alpha=4, seed=5)
    save_adapter(folder / "vera", root, "VERA", r=4, seed=6)
    save_adapter(folder / "dora", root, r=2, use_dora=True, seed=7)
    for index in range(2):
        fields = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"], "seed": 8 + index}
        save_adapter(folder / f"ia3_{index}", root, "IA3", **fields)
    return folder


def merge(place: Path, names: str, out: Path, *, with_base: bool = False, **settings: object) -> MergeReport:
    folders = [place / name for name in names.split()]
    chosen = MergeSettings(**settings)  # type: ignore[arg-type]
    return merge_adapters(folders, out, chosen, base=place / "base" if with_base else None)


def merged_deltas(place: Path, names: str, out: Path, **settings: object) -> dict[str, torch.Tensor]:
    merge(place, names, out, **settings)
    return deltas(place / "base", out)


@pytest.mark.parametrize("name", ["a", "b", "c", "loha", "vera", "dora", "ia3_0"])
def test_one_adapter_with_weight_one_is_itself(place: Path, tmp_path: Path, name: str) -> None:
    merge(place, name, tmp_path / "m")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (place / name, tmp_path / "m"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (tmp_path / "m/adapter_config.json").read_bytes() == (place / name / "adapter_config.json").read_bytes()


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_one_adapter_is_scaled(place: Path, tmp_path: Path, method: str) -> None:
    found = merged_deltas(place, "c", tmp_path / "m", method=method, weights=(-0.5,))
    assert_same(found, total((-0.5, deltas(place / "base", place / "c"))))


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_the_sum_is_exact(place: Path, tmp_path: Path, method: str) -> None:
    """Ranks, alphas, patterns, rsLoRA and targets differ."""
    parts = [deltas(place / "base", place / name) for name in "abc"]
    found = merged_deltas(place, "a b c", tmp_path / "m", method=method, weights=(0.5, -1.5, 2.0))
    assert_same(found, total(*zip((0.5, -1.5, 2.0), parts, strict=True)))


def test_linear_finds_the_smallest_rank(place: Path, tmp_path: Path) -> None:
    report = merge(place, "a a", tmp_path / "m", weights=(1.0, 1.0))
    assert {row.rank for row in report.modules} == {4}
    assert report.energy == pytest.approx(1)
    assert report.cosines[0][1] == pytest.approx(1)
    assert report.sign_conflicts == 0


def test_methods_mix(place: Path, tmp_path: Path) -> None:
    parts = [deltas(place / "base", place / name) for name in ("a", "loha", "vera", "dora")]
    found = merged_deltas(place, "a loha vera dora", tmp_path / "m", with_base=True, rank=Rank(number=16))
    assert_same(found, total(*((1.0, part) for part in parts)), atol=1e-5)


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "ties_svd"])
def test_pruning_types_against_the_operator(place: Path, tmp_path: Path, method: str) -> None:
    """At full rank the result is the operator on whole updates."""
    first, second = (deltas(place / "base", place / name) for name in "ad")
    settings = {"weights": (0.7, 0.4), "density": (0.3, 0.5)}
    found = merged_deltas(place, "a d", tmp_path / "m", method=method, rank=Rank(number=16), **settings)
    operator = OPERATORS[SVD_TYPES.get(method, method)]
    wanted = {name: operator([first[name], second[name]], (0.7, 0.4), Settings((0.3, 0.5))) for name in first}
    assert_same(found, wanted, atol=1e-5)


@pytest.mark.parametrize("method", COMBINATION_TYPES)
@pytest.mark.parametrize("space", ["delta", "factors"])
def test_order_does_not_matter(place: Path, tmp_path: Path, method: str, space: str) -> None:
    density = {"density": (0.5, 0.25)} if SVD_TYPES.get(method, method) not in ("linear", "cat") else {}
    merge(place, "a d", tmp_path / "1", method=method, space=space, weights=(1.0, 0.5), **density)
    swapped = {key: value[::-1] for key, value in density.items()}
    merge(place, "d a", tmp_path / "2", method=method, space=space, weights=(0.5, 1.0), **swapped)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "12")
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("method", ["linear", "cat", "svd", "ties"])
def test_an_adapter_minus_itself_is_nothing(place: Path, tmp_path: Path, method: str) -> None:
    density = {"density": (0.5,)} if method == "ties" else {}
    found = merged_deltas(place, "a a", tmp_path / "m", method=method, weights=(1.0, -1.0), **density)
    assert max(float(delta.abs().max()) for delta in found.values()) < 1e-7


@pytest.mark.parametrize("method", [name for name in COMBINATION_TYPES if "dare" not in name])
def test_factors_space_is_add_weighted_adapter(place: Path, tmp_path: Path, method: str) -> None:
    density = {"density": 0.4} if SVD_TYPES.get(method, method) not in ("linear", "cat") else {}
    model = load(place / "base", place / "a")
    model.load_adapter(place / "d", "d")
    model.add_weighted_adapter(["default", "d"], [0.7, -0.4], "both", combination_type=method, **density)
    model.set_adapter("both")
    settings = {"density": (0.4,)} if density else {}
    merge(place, "a d", tmp_path / "m", method=method, space="factors", weights=(0.7, -0.4), **settings)
    merged = load(place / "base", tmp_path / "m")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=0)


def test_dare_keeps_the_mean_and_follows_the_seed(place: Path, tmp_path: Path) -> None:
    def drawn(seed: int, name: str) -> torch.Tensor:
        settings = {"method": "dare_linear", "density": (0.5,), "seed": seed, "rank": Rank(number=16)}
        return merged_deltas(place, "a d", tmp_path / name, **settings)["model.layers.0.self_attn.q_proj"]

    assert torch.equal(drawn(1, "1"), drawn(1, "2"))
    assert not torch.equal(drawn(1, "3"), drawn(2, "4"))
    exact = total(*((1.0, deltas(place / "base", place / name)) for name in "ad"))["model.layers.0.self_attn.q_proj"]
    mean = torch.stack([drawn(seed, f"mean{seed}") for seed in range(30)]).mean(0)
    assert torch.linalg.norm(mean - exact) < 0.3 * torch.linalg.norm(exact)


def test_a_share_of_the_energy(place: Path, tmp_path: Path) -> None:
    report = merge(place, "a d", tmp_path / "m", rank=Rank(energy=0.8))
    assert all(row.energy >= 0.8 for row in report.modules)
    assert report.energy < 0.999
    found = deltas(place / "base", tmp_path / "m")
    exact = total(*((1.0, deltas(place / "base", place / name)) for name in "ad"))
    for row in report.modules:
        kept = torch.linalg.norm(found[row.module]) ** 2 / torch.linalg.norm(exact[row.module]) ** 2
        assert float(kept) == pytest.approx(row.energy, abs=1e-4)


def test_scales_merge_about_one(place: Path, tmp_path: Path) -> None:
    first, second = (load_file(place / f"ia3_{index}/adapter_model.safetensors") for index in range(2))
    merge(place, "ia3_0 ia3_1", tmp_path / "delta", weights=(0.5, 2.0))
    merge(place, "ia3_0 ia3_1", tmp_path / "factors", weights=(0.5, 2.0), space="factors")
    delta, factors = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("delta", "factors"))
    for key in first:
        torch.testing.assert_close(delta[key], 1 + 0.5 * (first[key] - 1) + 2 * (second[key] - 1))
        torch.testing.assert_close(factors[key], 0.5 * first[key] + 2 * second[key])
    load(place / "base", tmp_path / "delta")


def test_modules_trained_in_full_are_task_vectors(place: Path, tmp_path: Path) -> None:
    for index in range(2):
        save_adapter(tmp_path / f"{index}", place / "base", r=2, modules_to_save=["lm_head"], seed=20 + index)
    folders = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(InputError, match=r"lm_head\.weight is trained in full"):
        merge_adapters(folders, tmp_path / "m", MergeSettings())
    merge_adapters(folders, tmp_path / "m", MergeSettings(weights=(0.5, 0.25)), base=place / "base")
    key = "base_model.model.lm_head.weight"
    heads = [load_file(folder / "adapter_model.safetensors")[key] for folder in (*folders, tmp_path / "m")]
    original = load_file(place / "base/model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(heads[2], original + 0.5 * (heads[0] - original) + 0.25 * (heads[1] - original))
    load(place / "base", tmp_path / "m")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_task_vectors(tmp_path: Path, bias: str) -> None:
    """Those of adapted modules and of others: the result loads, and computes with them."""
    base = save_base(tmp_path / "base", attention_bias=True)
    for index in range(2):
        targets = ["q_proj", "v_proj"][: 2 - index] if bias == "all" else ["q_proj"]
        save_adapter(tmp_path / f"{index}", base, r=2, bias=bias, target_modules=targets, seed=20 + index)
    folders = [tmp_path / "0", tmp_path / "1"]
    merge_adapters(folders, tmp_path / "m", MergeSettings(weights=(0.5, 0.25)), base=base)
    found = [biases(base, folder) for folder in (*folders, tmp_path / "m")]
    original = {name: tensor for name, tensor in load_file(base / "model.safetensors").items() if name in found[2]}
    assert original.keys() == found[2].keys()
    for name, bare in original.items():
        wanted = bare + 0.5 * (found[0][name] - bare) + 0.25 * (found[1][name] - bare)
        torch.testing.assert_close(found[2][name], wanted)
    export_lora(tmp_path / "0", tmp_path / "l", portable=False)
    torch.testing.assert_close(logits(load(base, tmp_path / "l")), logits(load(base, tmp_path / "0")))


def biases(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The biases of base + adapter by their name in the base."""
    merged = load(base, adapter).merge_and_unload().state_dict()
    return {name: tensor for name, tensor in merged.items() if name.endswith("bias")}


def test_trainable_tokens_are_task_vectors(place: Path, tmp_path: Path) -> None:
    for index, tokens in enumerate(([7, 3], [3, 11])):
        save_adapter(tmp_path / f"{index}", place / "base", r=2, trainable_token_indices=tokens, seed=30 + index)
    folders = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(InputError, match="trainable tokens"):
        merge_adapters(folders, tmp_path / "m", MergeSettings())
    merge_adapters(folders, tmp_path / "m", MergeSettings(weights=(0.5, 0.25)), base=place / "base")
    parts = [deltas(place / "base", folder) for folder in folders]
    assert_same(deltas(place / "base", tmp_path / "m"), total((0.5, parts[0]), (0.25, parts[1])))
    config = json.loads((tmp_path / "m/adapter_config.json").read_text())
    assert config["trainable_token_indices"] == [3, 7, 11]
    settings = MergeSettings(method="magnitude_prune", density=(0.5,))
    merge_adapters(folders, tmp_path / "half", settings, base=place / "base")
    kept = deltas(place / "base", tmp_path / "half")["model.embed_tokens"]
    assert int((kept[:, 7] != 0).sum() + (kept[:, 11] != 0).sum()) <= 32  # each adapter keeps half of its own two rows


@pytest.mark.parametrize(
    ("names", "settings", "problem"),
    [
        ("a d", {"method": "ties"}, "--density"),
        ("a d", {"method": "mean"}, "no method"),
        ("a d", {"density": (0.5,)}, "--density: means nothing for linear"),
        ("a d", {"majority_sign_method": "total"}, "--majority-sign-method: means nothing for linear"),
        ("a d", {"weights": (1.0,)}, "1 weights for 2"),
        ("a d", {"method": "ties", "density": (2.0,)}, "between|<= 1"),
        ("a b", {"space": "factors"}, "same r"),
        ("a loha", {"space": "factors"}, "no factors"),
        ("a dora", {}, "--base"),
        ("ia3_0 ia3_1", {"method": "cat"}, "no"),
        ("a ia3_0", {}, "--base"),
    ],
)
def test_refusals(place: Path, tmp_path: Path, names: str, settings: dict, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        merge(place, names, tmp_path / "m", **settings)
    assert not list(tmp_path.iterdir())


def test_different_bases_are_refused(place: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", hidden_size=32)
    save_adapter(tmp_path / "x", other, r=4)
    with pytest.raises(InputError, match="different bases"):
        merge_adapters([place / "a", tmp_path / "x"], tmp_path / "m", MergeSettings())
    with pytest.raises(InputError, match=r"q_proj"):
        merge_adapters([place / "a", tmp_path / "x"], tmp_path / "m", MergeSettings(), base=place / "base")


def test_same_name_other_shapes_is_refused(place: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "x", save_base(tmp_path / "other", hidden_size=32), r=4)
    config = json.loads((tmp_path / "x/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(place / "base")
    shutil.rmtree(tmp_path / "other")
    (tmp_path / "x/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="q_proj"):
        merge_adapters([place / "a", tmp_path / "x"], tmp_path / "m", MergeSettings())


def test_prompts_are_refused(place: Path, tmp_path: Path) -> None:
    from peftcli import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(load_base(place / "base"), config).save_pretrained(tmp_path / "p")
    with pytest.raises(InputError, match="no update to merge"):
        merge_adapters([tmp_path / "p", tmp_path / "p"], tmp_path / "m", MergeSettings(), base=place / "base")


def test_broken_adapters_are_refused(place: Path, tmp_path: Path) -> None:
    tensors = load_file(place / "a/adapter_model.safetensors")
    key = next(iter(tensors))
    (tmp_path / "x").mkdir()
    (tmp_path / "x/adapter_config.json").write_bytes((place / "a/adapter_config.json").read_bytes())
    save_file({**tensors, key: tensors[key] * float("nan")}, tmp_path / "x/adapter_model.safetensors")
    with pytest.raises(InputError, match=r"NaN|finite"):
        merge_adapters([place / "a", tmp_path / "x"], tmp_path / "m", MergeSettings())


def test_never_into_an_input(place: Path, tmp_path: Path) -> None:
    for target in (place / "a", place / "a/inside", place):
        with pytest.raises(InputError, match="input"):
            merge_adapters([place / "a"], target, MergeSettings(), overwrite=True)


def test_overwrite(place: Path, tmp_path: Path) -> None:
    merge(place, "a d", tmp_path / "m")
    with pytest.raises(InputError, match="--overwrite"):
        merge(place, "a d", tmp_path / "m")
    merge_adapters([place / "c"], tmp_path / "m", MergeSettings(), overwrite=True)
    assert json.loads((tmp_path / "m/merge.json").read_text())["parents"][0]["name"] == "c"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not replaced"):
        merge_adapters([place / "c"], tmp_path / "precious", MergeSettings(), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "precious"]


def test_report_and_card(place: Path, tmp_path: Path) -> None:
    report = merge(place, "a b", tmp_path / "m", method="ties", density=(0.5,))
    stored = json.loads((tmp_path / "m/merge.json").read_text())
    assert stored["method"] == "ties"
    assert len(stored["modules"]) == len(report.modules)
    card = (tmp_path / "m/README.md").read_text()
    assert all(parent.sha256 in card for parent in report.parents)
    row = next(row for row in report.modules if row.module.endswith("layers.0.self_attn.q_proj"))
    assert row.parents[1] is None
    assert row.parents[0] == pytest.approx(
        float(torch.linalg.norm(deltas(place / "base", place / "a")[row.module])), rel=1e-4
    )


def test_lora_files_are_merged_without_torch(place: Path, tmp_path: Path) -> None:
    """torch takes longer to import than the merge takes."""
    code = (
        "import sys; from peftcli.__main__ import main\ncode = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    )
    for method in ("linear", "cat", "svd", "ties", "dare_ties"):
        for space in ("delta", "factors"):
            options = ["--method", method, "--space", space, "-o", str(tmp_path / method / space)]
            options += ["--density", "0.5"] if "ties" in method else []
            command = [sys.executable, "-c", code, "merge", str(place / "a"), str(place / "d"), *options]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            assert done.stdout.splitlines()[-1] == "0 False"


@pytest.mark.parametrize("method", [name for name in SVD_TYPES if "dare" not in name])
def test_in_factor_space_svd_types_take_the_largest_rank_of_all(place: Path, tmp_path: Path, method: str) -> None:
    """As in PEFT: also where the adapter of that rank leaves the module alone."""
    save_adapter(tmp_path / "small", place / "base", r=2, lora_alpha=2, target_modules=["q_proj", "down_proj"], seed=9)
    save_adapter(tmp_path / "two", place / "base", r=2, lora_alpha=2, target_modules=["down_proj"], seed=10)
    density = (0.5,) if SVD_TYPES[method] != "linear" else ()
    settings = MergeSettings(method=method, space="factors", density=density)
    report = merge_adapters([tmp_path / "small", tmp_path / "two", place / "a"], tmp_path / "m", settings)
    assert {row.rank for row in report.modules if "down_proj" in row.module} == {4}
