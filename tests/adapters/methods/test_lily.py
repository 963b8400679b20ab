"""Lily: what layers share, live and in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peftcli import LilyConfig, PeftModel, get_peft_model
from peftcli.errors import InputError

IDS = torch.tensor([[3, 5, 7, 1], [9, 3, 2, 5]])


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_attention_heads=2, num_key_value_heads=1, **sizes))


def lily() -> PeftModel:
    config = LilyConfig(r=2, stride_A=2, num_B=3, target_modules=["q_proj", "v_proj"], init_weights=False)
    return get_peft_model(base(), config).eval()


def test_layers_share_a_in_strides_and_b_everywhere() -> None:
    model = lily()
    layers = [model.get_base_model().model.layers[i].self_attn for i in range(4)]
    a = [layer.q_proj.lily_A["default"].weight for layer in layers]
    assert [[one is other for other in a] for one in a[::2]] == [[True, True, False, False], [False, False, True, True]]
    assert len({id(layer.q_proj.lily_B["default"].weight) for layer in layers}) == 1
    assert len({id(layer.v_proj.lily_B["default"].weight) for layer in layers}) == 1
    assert layers[0].q_proj.lily_B["default"].weight is not layers[0].v_proj.lily_B["default"].weight
    in_q, in_v, routers = 2 * 2 * 16 + 6 * 16, 2 * 2 * 16 + 6 * 8, 8 * 6
    assert model.get_nb_trainable_parameters()[0] == in_q + in_v + routers


def test_files_hold_what_is_shared_at_each_module_and_it_must_agree(tmp_path: Path) -> None:
    model = lily()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert len(tensors) == 4 * 2 * 3
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    key = "base_model.model.model.layers.3.self_attn.q_proj.lily_B.weight"
    save_file({**tensors, key: tensors[key] + 1}, file)
    with pytest.raises(InputError, match="the two modules share it"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_rows_of_several_adapters_are_refused() -> None:
    with pytest.raises(InputError, match="looks at the whole batch"):
        lily()(IDS, adapter_names=["default", "__base__"])
