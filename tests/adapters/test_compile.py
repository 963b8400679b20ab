"""What `torch.compile` takes: every method, forward and backward, in one graph; and what happens around it."""

from __future__ import annotations

import copy

import pytest
import torch
from sites import SITES
from test_properties import ROWS, Row, adapted, randomize
from torch import nn

from peftcli import LoraConfig, get_peft_model
from peftcli.adapters.registry import adapter_class

LINEAR = next(site for site in SITES if site.name == "linear")
ON_LINEAR = [row for row in ROWS if LINEAR.kind in adapter_class(row.config()).kinds and LINEAR.name not in row.without]


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("row", ON_LINEAR, ids=str)
def test_one_graph_forward_and_backward(row: Row) -> None:
    model, x, _ = adapted(row, LINEAR)
    expected = model(x)
    expected.square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(x)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    output.square().sum().backward()
    for name, p in model.named_parameters():
        if name in plain:
            torch.testing.assert_close(p.grad, plain[name], atol=1e-4, rtol=1e-3)


def test_switching_disabling_and_merging_a_compiled_model() -> None:
    """The compiled model follows: it is compiled again where the adapters changed."""
    row = next(row for row in ROWS if row.method == "LORA")
    model, x, base = adapted(row, LINEAR)
    model.add_adapter("other", row.config())
    model.set_adapter("other")
    randomize(model, seed=2)
    model.eval()
    compiled = torch.compile(model, backend="aot_eager")
    for name in ("default", "other"):
        model.set_adapter(name)
        torch.testing.assert_close(compiled(x), model(x))
    with model.disable_adapter():
        torch.testing.assert_close(compiled(x), base(x))
    mixed = ["other", "__base__", "default"]
    torch.testing.assert_close(compiled(x, adapter_names=mixed), model(x, adapter_names=mixed))
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-4)


def test_embeddings_heads_and_combined_adapters_of_a_compiled_model() -> None:
    """The rest of the guide's list: adapted embeddings, modules trained in full, combining, deleting, unloading."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    options = {"r": 2, "target_modules": ["0", "1"], "init_lora_weights": False}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**options, modules_to_save=["3"]))
    ids = torch.arange(10)
    torch.compile(model, backend="aot_eager", fullgraph=True)(ids).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 6 and all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.add_adapter("other", LoraConfig(**options))
    for kind in ("linear", "svd", "cat"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.7], kind, combination_type=kind)
        model.set_adapter(kind)
        torch.testing.assert_close(compiled(ids), model(ids))
    model.set_adapter("default")
    for name in ("linear", "svd", "cat", "other"):
        model.delete_adapter(name)
    expected = model(ids)
    torch.testing.assert_close(compiled(ids), expected)
    merged = torch.compile(model.merge_and_unload(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(merged(ids), expected, atol=1e-5, rtol=1e-4)
