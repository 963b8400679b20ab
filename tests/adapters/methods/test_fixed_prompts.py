"""CPT and Cartridge: prompts of which a part stays where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peftcli import PeftModel, get_peft_model
from peftcli.adapters.methods.cartridge import CartridgeConfig
from peftcli.adapters.methods.cpt import CPTConfig

IDS = torch.arange(12).reshape(2, 6)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()


def cpt(**options: object) -> CPTConfig:
    return CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7, 8], cpt_tokens_type_mask=[1, 2, 3, 4], **options)


def take_steps(model: PeftModel, count: int = 20, rate: float = 0.5) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=rate)
    for _ in range(count):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def test_a_fresh_cpt_prompt_is_its_words() -> None:
    base = llama()
    words = torch.tensor([[5, 6, 7, 8]]).expand(2, -1)
    expected = base(torch.cat([words, IDS], dim=1)).logits
    torch.testing.assert_close(get_peft_model(base, cpt()).eval()(input_ids=IDS).logits, expected)


def test_cpt_tokens_stay_inside_their_ball_and_outputs_never_move(tmp_path: Path) -> None:
    model = get_peft_model(llama(), cpt(opt_projection_epsilon=0.5))
    start = model.prompt_encoder["default"]().detach().clone()
    take_steps(model)
    moved = (model.prompt_encoder["default"]().detach() - start).norm(dim=1)
    unit = (16 / 2048) ** 0.5
    assert (moved <= torch.tensor([0.1, 0.5, 0.1, 1e-9]) * unit + 1e-6).all()
    assert (moved[:3] > 1e-4).all()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_the_front_of_a_cartridge_stays(tmp_path: Path) -> None:
    model = get_peft_model(llama(), CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=2))
    start = model.prompt_encoder["default"]().detach().clone()
    take_steps(model)
    now = model.prompt_encoder["default"]().detach()
    assert torch.equal(now[:2], start[:2])
    assert not torch.equal(now[2:], start[2:])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1]), "cpt_mask.*1 entries for 2"),
        (CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 99]), "99 is no token"),
        (CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_frozen_tokens=3), "3 of 2 tokens"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        get_peft_model(llama(), config)
