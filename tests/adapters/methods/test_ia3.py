"""IA3: its two lists of modules, whichever of them is left open, are saved so that they can be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import llama

from peftcli import IA3Config, PeftModel, get_peft_model


@pytest.mark.parametrize(
    ("lists", "inputs"),
    [
        ({"target_modules": "all-linear"}, {"down_proj"}),
        ({"target_modules": ["q_proj", "v_proj"]}, set()),
        ({"target_modules": ["v_proj", "up_proj"], "feedforward_modules": ["up_proj"]}, {"up_proj"}),
        ({"target_modules": "all-linear", "feedforward_modules": ["up_proj", "down_proj"]}, {"up_proj", "down_proj"}),
    ],
)
def test_the_lists_that_are_saved_fit_together(lists: dict[str, Any], inputs: set[str], tmp_path: Path) -> None:
    """The usual feedforward modules of a model type, or those beside `all-linear`, are no names of target_modules."""
    model = get_peft_model(llama(), IA3Config(init_ia3_weights=False, **lists)).eval()
    scaled = {
        path.rpartition(".")[2]
        for path, module in model.get_base_model().named_modules()
        if hasattr(module, "adapters") and module.adapters["default"].acts_on_inputs
    }
    assert scaled == inputs
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
