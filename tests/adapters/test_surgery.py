"""Layer replication: shared weights, separate adapters, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from peftcli import LoraConfig, PeftModel, get_peft_model
from tests.adapters.small import IDS, llama

RANGES = [[0, 2], [1, 3]]


def config(**options: object) -> LoraConfig:
    return LoraConfig(
        target_modules=["q_proj"], layer_replication=RANGES, **{"r": 2, "init_lora_weights": False, **options}
    )


def test_repeated_layers_share_the_base_and_have_their_own_adapters() -> None:
    base = llama(layers=3)
    before = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, config())
    layers = base.model.layers
    assert base.config.num_hidden_layers == len(layers) == 4
    one, other = layers[1].self_attn.q_proj, layers[2].self_attn.q_proj
    assert one.base_layer.weight is other.base_layer.weight
    assert not torch.equal(one.lora_A["default"].weight, other.lora_A["default"].weight)
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    trainable, total = model.get_nb_trainable_parameters()
    assert total - trainable == before


def test_generation_with_a_cache_equals_generation_without() -> None:
    model = get_peft_model(llama(layers=3), config()).eval()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, use_cache=True, **options), model.generate(IDS, use_cache=False, **options))


def test_saved_loaded_unloaded_and_never_merged(tmp_path: Path) -> None:
    base = llama(layers=3)
    expected_base = base(IDS).logits
    model = get_peft_model(base, config()).eval()
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama(layers=3), tmp_path)(IDS).logits, expected)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="base model layers are replicated"):
            merge()
    bare = model.unload()
    assert bare.config.num_hidden_layers == 3
    assert torch.equal(bare(IDS).logits, expected_base)


def test_bert_has_layers_to_replicate_too() -> None:
    bert = BertModel(
        BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16)
    )
    model = get_peft_model(bert, LoraConfig(target_modules=["query"], layer_replication=RANGES))
    assert len(bert.encoder.layer) == 4
    assert model(IDS).last_hidden_state.shape == (2, 6, 16)


@pytest.mark.parametrize("ranges", [[[0, 4]], [[2, 2]], [[0, 3]] * 400])
def test_ranges_outside_the_model_are_refused_and_nothing_changes(ranges: list) -> None:
    base = llama(layers=3)
    with pytest.raises(ValueError, match="layer_replication"):
        get_peft_model(base, LoraConfig(target_modules=["q_proj"], layer_replication=ranges))
    with pytest.raises(ValueError, match="not found"):
        get_peft_model(base, LoraConfig(target_modules=["nothing"], layer_replication=RANGES))
    assert base.config.num_hidden_layers == len(base.model.layers) == 3
