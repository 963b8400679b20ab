"""Every method on bitsandbytes' 4- and 8-bit layers: the table of test_properties.py, on one quantised 64 x 64 layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sites import Net
from test_properties import ROWS, Row, randomize, told
from test_quantized import quantize
from torch import nn

from peftcli import PeftModel, get_peft_model
from peftcli.adapters.registry import adapter_class

pytest.importorskip("bitsandbytes", reason="needs the quantization extra")

FROM_WEIGHT = [row for row in ROWS if row.options.get("init_lora_weights") in ("pissa", "pissa_niter_4", "olora")]
"""Starts that change the base weight."""

LINEAR = [row for row in ROWS if "linear" in adapter_class(row.config()).kinds and row not in FROM_WEIGHT]

table = pytest.mark.parametrize("kind", ["nf4", "int8"])
rows = pytest.mark.parametrize("row", LINEAR, ids=str)


def base_of(kind: str) -> tuple[Net, torch.Tensor]:
    torch.manual_seed(0)
    return Net(quantize(nn.Linear(64, 64), kind)).eval(), torch.randn(3, 5, 64)


def adapted(row: Row, kind: str) -> tuple[PeftModel, torch.Tensor, Net]:
    base, x = base_of(kind)
    twin = copy.deepcopy(base)
    model = told(get_peft_model(base, row.config()).eval(), row)
    randomize(model)
    return model, x, twin


@table
@rows
def test_trains_and_merges(row: Row, kind: str) -> None:
    model, x, base = adapted(row, kind)
    layer: Any = next(layer for _, layer in model.base_model.attached.layers())
    codes = layer.base_layer.weight.data.clone()
    expected = model(x)
    assert not torch.allclose(expected, base(x), atol=1e-3)
    (expected.float() ** 2).sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dead = [name for name, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert trained and not [name for name in dead if not any(part in name for part in row.no_gradient)]
    assert torch.equal(layer.base_layer.weight.data, codes)
    if all(adapter.mergeable for adapter in layer.adapters.values()):
        merged = model.merge_and_unload()
        assert type(merged.site) is nn.Linear
        tolerance = 0.05 if kind == "int8" else 1e-4  # LLM.int8 rounds its inputs to 8 bits as well
        torch.testing.assert_close(merged(x), expected.detach(), atol=tolerance, rtol=0)
