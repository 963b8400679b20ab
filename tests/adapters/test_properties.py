"""The table that tests every method: one row a method, every property on every kind of module it means something for."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from prompts import ROWS as PROMPT_ROWS
from sites import SITES, Net, SiteCase

import peftcli
from peftcli import PeftModel, get_peft_model
from peftcli.adapters.base import DeltaAdapter
from peftcli.adapters.registry import METHODS, adapter_class, config_class


@dataclass(frozen=True)
class Row:
    """A method with settings that fit the tiny modules.

    Attributes:
        method: its name in the registry.
        options: config fields.
        identity: a fresh adapter changes nothing.
        sites: names of sites to leave out, where this setting does not fit their shape.
        tolerance: of merged against adapted outputs.
        no_gradient: tensors that get none at the random point the tests use, and why that is right.
        second: config fields of another adapter beside the first.
        batch: what the method must be told about a batch of three rows.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    identity: bool = True
    without: tuple[str, ...] = ()
    tolerance: float = 1e-5
    no_gradient: tuple[str, ...] = ()
    second: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, Any] = field(default_factory=dict)

    def config(self, **options: Any) -> peftcli.PeftConfig:
        return config_class(self.method)(target_modules=["site"], **copy.deepcopy(self.options), **options)

    def __str__(self) -> str:
        told = ",".join(f"{key}={value}" for key, value in self.options.items() if not isinstance(value, dict))
        return f"{self.method}({told})"


ROWS = [
    Row("LORA", {"r": 4}),
    Row("LORA", {"r": 4, "use_rslora": True, "lora_alpha": 3}),
    Row("LORA", {"r": 4, "init_lora_weights": "gaussian"}),
    Row("LORA", {"r": 4, "init_lora_weights": "orthogonal"}),
    Row("LORA", {"r": 4, "bias": "lora_only"}),
    Row("LORA", {"r": 4, "lora_bias": True}, without=("linear_no_bias", "conv3d", "embedding")),
    Row("LORA", {"r": 4, "lora_bias": True, "bias": "lora_only"}, without=("linear_no_bias", "conv3d", "embedding")),
    Row("LORA", {"r": 3, "use_rslora": True}),  # of a rank that the groups of the convolution do not divide
    Row("LORA", {"r": 8, "rank_pattern": {"site": 2}, "alpha_pattern": {"s.te": 6}}),
    Row("LORA", {"r": 4, "use_dora": True}),
    Row("LORA", {"r": 4, "use_bdlora": {"target_modules_bd_a": ["site"], "nblocks": 2}}),
    Row("LORA", {"r": 4, "use_bdlora": {"target_modules_bd_b": ["site"], "nblocks": 4}}),
    Row("LORA", {"r": 4, "kasa_config": {"beta": 1e-3}}, identity=False),
    Row("LORA", {"r": 4, "monteclora_config": {"num_samples": 4}}, no_gradient=("monteclora_sampler",)),
    Row("LORA", {"r": 4, "velora_config": {"num_groups": 5}}),
    Row("IA3", {"feedforward_modules": []}),
    Row("IA3", {"feedforward_modules": ["site"]}),
    Row("OFT", {"oft_block_size": 8}, without=("conv2d_grouped",)),
    Row("OFT", {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False, "coft": True, "eps": 0.5}),
    Row("OFT", {"oft_block_size": 2, "block_share": True, "module_dropout": 0.1}),
    Row("OFT", {"r": 4}),
    Row("OFT", {"r": 3, "block_share": True, "coft": True, "eps": 0.05}),
    Row("BOFT", {"boft_block_size": 8}, without=("conv2d_grouped",)),
    Row("BOFT", {"boft_block_size": 2, "boft_n_butterfly_factor": 3}, without=("conv2d_grouped",)),
    Row("HRA", {"r": 4}),
    Row("HRA", {"r": 2, "apply_GS": True}, identity=False),
    Row("LN_TUNING"),
    Row("POLY", {"r": 2, "n_tasks": 3, "n_skills": 2, "n_splits": 2}, batch={"task_ids": torch.tensor([2, 0, 2])}),
    Row("TRAINABLE_TOKENS", {"token_indices": [13, 3, 6]}),
    Row("ROAD", {"group_size": 4}),
    Row(
        "ROAD",
        {"group_size": 8, "variant": "road_2"},
        without=("conv1d", "conv2d_rectangular", "conv2d_dilated", "conv2d_reflect", "conv2d_grouped"),
    ),
    Row("ROAD", {"group_size": 2, "variant": "road_4"}),
    Row("BOFT", {"boft_block_size": 0, "boft_block_num": 2, "boft_dropout": 0.5, "bias": "boft_only"}),
    Row("LORA", {"r": 4, "init_lora_weights": "pissa"}),
    Row("LORA", {"r": 4, "init_lora_weights": "pissa_niter_4", "use_rslora": True}),
    Row("LORA", {"r": 4, "init_lora_weights": "olora", "use_dora": True}),
    Row("LOHA", {"r": 4, "alpha": 6}),
    Row("LOHA", {"r": 4, "use_effective_conv2d": True}),
    Row("LOKR", {"r": 4, "alpha": 6}),
    Row("LOKR", {"r": 1, "decompose_both": True, "decompose_factor": 4, "init_weights": "lycoris"}),
    Row("LOKR", {"r": 1, "use_effective_conv2d": True}),
    Row("VERA", {"r": 8, "d_initial": 0.5}),
    Row("VERA", {"r": 8, "save_projection": False, "projection_prng_key": 3}),
    Row("FOURIERFT", {"n_frequency": 50, "init_weights": True}),
    Row("FOURIERFT", {"n_frequency": 60, "scaling": 15, "n_frequency_pattern": {"s.te": 1}}, identity=False),
    Row("VBLORA", {"r": 2, "num_vectors": 8, "vector_length": 2, "topk": 3}, identity=False),
    Row("ADALORA", {"init_r": 4, "target_r": 2, "total_step": 10}, second={"inference_mode": True}),
    Row("HIRA", {"r": 4}),
    Row("HIRA", {"r": 4, "init_weights": "gaussian", "rank_pattern": {"site": 2}}),
    Row("MISS", {"r": 5}),
    Row("MISS", {"r": 4, "init_weights": "mini", "mini_r": 4}),
    Row("MISS", {"r": 4, "init_weights": "bat"}, without=("conv2d_grouped",)),
    Row("RANDLORA", {"r": 4, "randlora_alpha": 10}),
    Row("RANDLORA", {"r": 3, "randlora_alpha": 10, "sparse": True, "save_projection": False}),
    Row("SHIRA", {"r": 2, "random_seed": 1}),
    Row("C3A", {"block_size": 2, "init_weights": True}, without=("conv2d_grouped",)),
    Row("C3A", {"block_size": 2, "block_size_pattern": {"s.te": 1}}, identity=False),
    Row("GRALORA", {"r": 4, "alpha": 6}),
    Row("GRALORA", {"r": 2, "alpha": 6, "hybrid_r": 3, "gralora_k": 2}),
    Row("DELORA", {"r": 4, "delora_lambda": 3}),
    Row("WAVEFT", {"n_frequency": 50, "wavelet_family": "db2", "scaling": 5}),
    Row("WAVEFT", {"n_frequency": 60, "scaling": 5, "use_idwt": False, "init_weights": False}, identity=False),
    Row("UNILORA", {"r": 2, "theta_d_length": 20}, identity=False),
    Row("UNILORA", {"r": 3, "theta_d_length": 31, "init_theta_d_bound": 0.1, "save_indices": True}, identity=False),
    Row("LILY", {"r": 4, "num_B": 3}),
    Row("TINYLORA", {"r": 3, "u": 6}),
    Row("TINYLORA", {"u": 5, "weight_tying": 1, "save_projection": False, "init_weights": "uniform"}, identity=False),
    Row("PVERA", {"r": 8, "d_initial": 0.5}),
    Row("BEFT", without=("linear_no_bias",)),
    Row("SUPERTUNING", {"sparsity": 0.8}),
    Row("SUPERTUNING", {"sparsity": 0.9, "r": 2, "lora_dropout": 0.5, "save_precomputed_indices": False}),
    Row("DEFT", {"r": 4}),
    Row("DEFT", {"r": 2, "alpha": 3, "decomposition_method": "qr", "deft_dropout": 0.5}, without=("attention",)),
    Row("DEFT", {"r": 2, "para": True}, identity=False),
    Row("GLORA", {"r": 2}, no_gradient=("glora_D",)),  # it multiplies the bias, which GPT-2's Conv1D starts at zero
    Row("GLORA", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}, no_gradient=("glora_D",)),
    Row("GLORA", {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"}),
    Row("PSOFT", {"r": 4}),
    Row("PSOFT", {"r": 4, "psoft_svd": "lowrank", "ab_svd_init": "pissa_init", "use_cayley_neumann": True}),
    Row("PSOFT", {"r": 3, "psoft_orth": False, "psoft_mag_a": False}),
    Row("PEANUT", {"r": 4, "act_fn": "gelu"}),
    Row("PEANUT", {"r": 4, "depth": 2, "act_fn": "tanh", "scaling": 0.5}),
    Row("OSF", {"effective_rank": 4}),
    Row("ADAMSS", {"r": 8, "num_subspaces": 2, "subspace_rank": 2}),
    Row("ADAMSS", {"r": 7, "num_subspaces": 3, "random_seed": 2}),
    Row("FROD", {"sparse_rate": 0.05}),
    Row("FROD", {"sparse_rate": 0.1, "save_projection": False, "projection_prng_key": 3}),
]

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set", "ignore:r reaches the number of outputs")

CASES = [
    pytest.param(row, site, id=f"{row}-{site}")
    for row in ROWS
    for site in SITES
    if site.kind in adapter_class(row.config()).kinds and site.name not in row.without
]
table = pytest.mark.parametrize(("row", "site"), CASES)


def base_of(site: SiteCase) -> tuple[Net, torch.Tensor]:
    torch.manual_seed(0)
    return Net(site.build()).eval(), site.inputs()


def adapted(row: Row, site: SiteCase, *, random: bool = True) -> tuple[PeftModel, torch.Tensor, Net]:
    """A model with an adapter moved off its starting point, an input, and the bare base."""
    base, x = base_of(site)
    twin = copy.deepcopy(base)
    model = told(get_peft_model(base, row.config()).eval(), row)
    if random:
        randomize(model)
    return model, x, twin


def told(model: PeftModel, row: Row) -> PeftModel:
    """The model, with what its method must be told about a batch said in every call."""
    model.forward = partial(model.forward, **row.batch)
    return model


def randomize(model: torch.nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_every_method_has_a_row() -> None:
    """Prompts have a table of their own, test_prompts.py; a few methods have tests of their own in methods/."""
    alone = {"ADAPTION_PROMPT", "CARTRIDGE", "CPT", "XLORA"}
    assert {row.method for row in (*ROWS, *PROMPT_ROWS)} | alone == set(METHODS)


@table
def test_fresh_adapter_changes_nothing(row: Row, site: SiteCase) -> None:
    if not row.identity:
        pytest.skip("this setting starts away from the base by design")
    model, x, base = adapted(row, site, random=False)
    torch.testing.assert_close(model(x), base(x), atol=1e-6, rtol=1e-5)


@table
def test_merged_is_adapted_and_unmerge_is_exact(row: Row, site: SiteCase) -> None:
    model, x, base = adapted(row, site)
    expected = model(x)
    assert not torch.allclose(expected, base(x), atol=1e-4), (
        "the adapter must do something for this test to mean anything"
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if any(layer.adapters["default"].merge_problem() for _, layer in model.base_model.attached.layers()):
        with pytest.raises(ValueError, match=r"(?i)merg"):
            model.merge_adapter()
        return
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, atol=row.tolerance, rtol=1e-4)
    model.unmerge_adapter()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, atol=row.tolerance, rtol=1e-4)
    assert set(merged.state_dict()) == set(base.state_dict())


@table
def test_switched_off_is_the_base(row: Row, site: SiteCase) -> None:
    model, x, base = adapted(row, site)
    expected = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), expected)


@table
def test_every_parameter_gets_a_gradient(row: Row, site: SiteCase) -> None:
    model, x, _ = adapted(row, site)
    (model(x) ** 2).sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    dead = [name for name, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [name for name in dead if not any(part in name for part in row.no_gradient)] == []
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@table
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_survive_checkpointing(row: Row, site: SiteCase, reentrant: bool) -> None:
    if reentrant and not site.inputs().is_floating_point():
        pytest.skip("reentrant checkpointing needs an input that takes a gradient")
    model, x, _ = adapted(row, site)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        (model(x.clone()) ** 2).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.get_base_model().checkpointing = reentrant
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other)


@table
def test_saved_and_loaded_is_the_same(row: Row, site: SiteCase, tmp_path: Any) -> None:
    model, x, base = adapted(row, site)
    model.save_pretrained(tmp_path / "one")
    again = told(PeftModel.from_pretrained(base, tmp_path / "one"), row)
    assert torch.equal(again(x), model(x))
    again.save_pretrained(tmp_path / "two")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@table
def test_delete_leaves_no_trace(row: Row, site: SiteCase) -> None:
    model, x, base = adapted(row, site)
    model.delete_adapter("default")
    inner = model.get_base_model()
    assert [type(m) for m in inner.modules()] == [type(m) for m in base.modules()]
    assert set(inner.state_dict()) == set(base.state_dict())
    assert torch.equal(inner(x), base(x))


@table
def test_rows_of_two_adapters_in_one_batch(row: Row, site: SiteCase) -> None:
    bias = row.options.get("bias", "none") != "none"
    if site.name in ("attention", "block") or bias or adapter_class(row.config()).rows_interact:
        pytest.skip("refused by name: see test_engine")
    model, x, base = adapted(row, site)
    model.add_adapter("other", row.config(**row.second))
    model.set_adapter("other")
    randomize(model, seed=2)
    model.eval()
    singles = []
    for name in ("default", "other"):
        model.set_adapter(name)
        singles.append(model(x))
    mixed = model(x, adapter_names=["other", "__base__", "default"])
    expected = torch.stack([singles[1][0], base(x)[1], singles[0][2]])
    torch.testing.assert_close(mixed, expected, atol=1e-6, rtol=1e-5)


@table
def test_two_active_adapters_compose(row: Row, site: SiteCase) -> None:
    """Both active and then merged: the same function, whatever the families."""
    if row.options.get("bias", "none") != "none":
        pytest.skip("one adapter with biases at a time")
    model, x, _ = adapted(row, site)
    model.add_adapter("other", row.config(**row.second))
    model.set_adapter("other")
    randomize(model, seed=2)
    if site.kind == "module":
        with pytest.raises(ValueError, match="more than one active adapter"):
            model.set_adapter(["default", "other"])
        assert model.active_adapters == ["other"]
        return
    model.set_adapter(["default", "other"])
    model.eval()
    expected = model(x)
    layer = next(layer for _, layer in model.base_model.attached.layers())
    if not any(adapter.merge_problem() for adapter in layer.adapters.values()):
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, atol=row.tolerance, rtol=1e-4)


@table
def test_half_precision_base_keeps_its_dtype(row: Row, site: SiteCase) -> None:
    base, x = base_of(site)
    base, x = base.to(torch.bfloat16), x.to(torch.bfloat16) if x.is_floating_point() else x
    model = told(get_peft_model(base, row.config()), row)
    floating = [p for p in model.parameters() if p.requires_grad]
    biases = "base_layer" if row.options.get("bias") else "no such name"  # they stand in the module, in its precision
    own = [p for name, p in model.named_parameters() if p.requires_grad and biases not in name]
    assert {p.dtype for p in own} == {torch.float32}
    randomize(model)
    output = model(x)
    assert output.dtype == torch.bfloat16
    (output.float() ** 2).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in floating if p.grad is not None)


@table
def test_works_without_tensors_on_the_meta_device(row: Row, site: SiteCase) -> None:
    """A memory plan attaches adapters to a model that has shapes only."""
    with torch.device("meta"):
        base = Net(site.build())
    model = get_peft_model(base, row.config())
    real, _, _ = adapted(row, site, random=False)
    assert model.get_nb_trainable_parameters() == real.get_nb_trainable_parameters()


def test_delta_methods_state_the_same_update_twice() -> None:
    """`activation` is a short cut for `delta`: the two must agree."""
    for row in ROWS:
        model, x, _ = adapted(row, SITES[0])
        for _, layer in model.base_model.attached.layers():
            adapter, p = layer.adapters["default"], layer.tensors("default")
            if isinstance(adapter, DeltaAdapter) and adapter.mergeable:
                quick = adapter.activation(p, x, layer.site)
                if quick is not None:
                    expected = x @ adapter.delta(p).T + adapter.merged_bias(p, torch.zeros(adapter.shape.out_features))
                    torch.testing.assert_close(quick, expected, atol=1e-5, rtol=1e-4)
