"""aLoRA: which tokens it acts on, in every way a batch can reach a layer."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peftcli import LoraConfig, PeftModel, get_peft_model
from peftcli.adapters import kv_cache
from peftcli.errors import InputError

IDS = torch.tensor([[3, 7, 8, 1, 7, 8, 2], [9, 3, 2, 5, 7, 8, 8], [4, 4, 6, 8, 7, 3, 7]])
STARTS = [4, 4, 7]
"""Where the last [7, 8] begins in each row; none in the last."""


def alora(**given: object) -> PeftModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_attention_heads=2, num_key_value_heads=2, **sizes))
    options = {"r": 2, "init_lora_weights": False, "alora_invocation_tokens": [7, 8]} | given
    return get_peft_model(
        base, LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], **options)
    ).eval()


def test_it_acts_from_the_last_invocation_on() -> None:
    model = alora()
    logits = model(input_ids=IDS).logits
    with model.disable_adapter():
        bare = model(IDS).logits
    for row, start in enumerate(STARTS):
        assert torch.equal(logits[row, :start], bare[row, :start])
        assert (logits[row, start:] - bare[row, start:]).abs().amax(-1).gt(1e-4).all()


def test_generation_with_and_without_a_cache_agree() -> None:
    model = alora()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(input_ids=IDS, **options)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))
    ids = IDS
    for _ in range(5):
        model.attached.context.input_ids, model.attached.context.generating = IDS, True
        ids = torch.cat([ids, model.get_base_model()(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, ids)
    beams = model.generate(input_ids=IDS[:1], num_beams=2, **options)
    assert beams.shape == (1, 12)


def test_the_cache_of_the_bare_base_serves_the_adapter() -> None:
    model = alora()
    expected = model(IDS[:1]).logits
    with model.disable_adapter():
        cache = kv_cache.given(model(IDS[:1, :4], use_cache=True))
    continued = model(IDS[:1, 4:], **{kv_cache.argument_of(model.get_base_model()): cache}).logits
    torch.testing.assert_close(continued, expected[:, 4:], atol=1e-5, rtol=1e-5)


def test_rows_of_several_adapters() -> None:
    model = alora()
    torch.manual_seed(1)
    model.add_adapter("other", LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    mixed = model(IDS, adapter_names=["default", "other", "__base__"]).logits
    torch.testing.assert_close(mixed[0], model(IDS).logits[0], atol=1e-6, rtol=1e-5)
    model.set_adapter("other")
    torch.testing.assert_close(mixed[1], model(IDS).logits[1], atol=1e-6, rtol=1e-5)


def test_what_it_cannot_do_is_refused() -> None:
    model = alora()
    with pytest.raises(InputError, match="token ids of the batch"):
        model(inputs_embeds=torch.randn(1, 3, 16))
    with pytest.raises(ValueError, match="merged"):
        model.merge_adapter()
    with pytest.raises(InputError, match="can't be combined with `alora_invocation_tokens`"):
        alora(use_dora=True)
    with pytest.raises(InputError, match="'pissa' can't be combined"):
        alora(init_lora_weights="pissa")
