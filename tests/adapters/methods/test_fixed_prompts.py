"""CPT and Cartridge: prompts of which a part stays where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftcli import PeftModel, compose_cartridge_adapters, get_peft_model, initialize_kv_prefix_from_text
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


def cartridge(tokens: int) -> CartridgeConfig:
    return CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of the words w0 .. w31, with a chat template that puts w31 in front."""
    model = Tokenizer(WordLevel({f"w{number}": number for number in range(32)}, "w0"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template="w31 {{ messages[0].content }}")


@pytest.mark.parametrize("use_chat_template", [False, True])
def test_a_cartridge_begins_as_a_text(use_chat_template: bool) -> None:
    """It then is the text: the bare model with the text in front gives the same."""
    model = get_peft_model(llama(), cartridge(4)).eval()
    prompt = initialize_kv_prefix_from_text(
        model, words(), text="w5 w6 w7 w8 w9", use_chat_template=use_chat_template, max_length=5
    )
    front = torch.tensor([[31, 5, 6, 7] if use_chat_template else [5, 6, 7, 8]]).expand(2, -1)
    expected = llama()(torch.cat([front, IDS], dim=1)).logits[:, 4:]
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    assert torch.equal(prompt, model.prompt_encoder["default"]())
    with pytest.raises(ValueError, match=r"num_virtual_tokens: is 4, but the text has only 2 tokens"):
        initialize_kv_prefix_from_text(model, words(), text="w5 w6", use_chat_template=False)


def test_cartridges_end_to_end(tmp_path: Path) -> None:
    for name, tokens in (("one", 3), ("two", 4)):
        get_peft_model(llama(), cartridge(tokens)).save_pretrained(tmp_path / name)
    compose_cartridge_adapters([tmp_path / "one", tmp_path / "two"], output_path=tmp_path / "both")
    prompts = {
        name: PeftModel.from_pretrained(llama(), tmp_path / name).prompt_encoder["default"]()
        for name in ("one", "two", "both")
    }
    assert torch.equal(prompts["both"], torch.cat([prompts["one"], prompts["two"]]))
    get_peft_model(llama(), cpt()).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is CPT"):
        compose_cartridge_adapters([tmp_path / "one", tmp_path / "other"], output_path=tmp_path / "x")
    assert not (tmp_path / "x").exists()


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
