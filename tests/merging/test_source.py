"""Updates read from files are those of the live model, for every method of the golden set."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from golden import Golden, find

from peftcli import PeftModel
from peftcli.adapters.config import read_config
from peftcli.adapters.layer import AdapterLayer
from peftcli.errors import InputError
from peftcli.merging.base_weights import BaseWeights
from peftcli.merging.source import Source

SHARED = Path(os.environ.get("PEFTCLI_SHARED", Path(__file__).parents[3] / "shared")).resolve()
CASES = find(SHARED) or {"none": None}

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
    pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed"),
]


@pytest.mark.parametrize("name", list(CASES))
def test_updates_are_those_of_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case: Golden | None = CASES[name]
    if case is None:
        pytest.skip(f"no golden adapters at {SHARED}")
    monkeypatch.chdir(case.folder)  # X-LoRA's config names its experts from there
    try:
        read_config(case.adapter / "adapter_config.json")
    except InputError:
        pytest.skip("a method or variant we do not have")
    try:
        source = Source(case.adapter, BaseWeights(case.folder.parents[1] / "bases" / case.facts["base"]))
    except InputError as error:
        assert "the order of the model's modules" in str(error)
        return
    if not source.paths:
        assert source.part is None or source.config.peft_type == "XLORA"
        return
    model = PeftModel.from_pretrained(case.base(), case.adapter, allow_pickle=True).eval()
    layers = {path: layer for path, layer in model.attached.layers() if layer.leader("default") is None}
    for module in source.paths:
        try:
            update = source.update(module)
        except InputError as error:
            assert re.search("no update|lora_bias|changes the bias", str(error))
            continue
        layer = layers[module]
        assert isinstance(layer, AdapterLayer)
        with torch.no_grad():
            wanted = layer.effective(["default"])[0] - layer.site.weight()
        torch.testing.assert_close(torch.from_numpy(update.dense()), wanted, atol=1e-5, rtol=0)
