"""Trained rows of an embedding: alone, tied to the head, and beside LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from peftcli import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from peftcli.errors import InputError

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
IDS = torch.tensor([[3, 5, 7, 31], [9, 3, 2, 5]])


def llama(*, tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()


def move(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


def by_hand(model: LlamaForCausalLM, rows: dict[int, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        for index, row in rows.items():
            model.get_input_embeddings().weight[index] = row
    return model(IDS).logits


@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_replaced_and_tied_heads_follow(tied: bool, tmp_path: Path) -> None:
    model = get_peft_model(llama(tied=tied), TrainableTokensConfig(token_indices=[31, 3, 5])).eval()
    move(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(trained) == ["base_model.model.model.embed_tokens.trainable_tokens_delta.default"]
    rows = next(iter(trained.values()))
    expected = by_hand(llama(tied=tied), dict(zip([31, 3, 5], rows.detach(), strict=True)))
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)

    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    places = ["lm_head", "model.embed_tokens"] if tied else ["model.embed_tokens"]  # PEFT stores a tied head's, too
    assert list(stored) == [f"base_model.model.{place}.trainable_tokens_delta" for place in places]
    assert all(torch.equal(tensor, rows) for tensor in stored.values())
    again = PeftModel.from_pretrained(llama(tied=tied), tmp_path)
    torch.testing.assert_close(again(IDS).logits, expected, atol=1e-5, rtol=1e-5)

    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied
    assert merged.config.tie_word_embeddings is tied


def test_the_head_s_share_of_the_gradient_arrives() -> None:
    model = get_peft_model(llama(tied=True), TrainableTokensConfig(token_indices=[3])).eval()
    rows = model.base_model.model.model.embed_tokens.trainable_tokens_delta["default"]
    model(torch.tensor([[1, 2]])).logits[..., 3].sum().backward()  # token 3 is scored, never read
    assert rows.grad.abs().sum() > 0
    assert any(p is rows for p in model.get_output_embeddings().parameters())


@pytest.mark.parametrize("targets", [["embed_tokens", "lm_head"], ["embed_tokens"]])
def test_naming_the_tied_head_changes_nothing(targets: list[str], tmp_path: Path) -> None:
    model = get_peft_model(llama(tied=True), TrainableTokensConfig(token_indices=[3], target_modules=targets))
    assert model.get_nb_trainable_parameters()[0] == 16
    model.delete_adapter("default")
    assert type(model.base_model.model.lm_head) is torch.nn.Linear
    assert set(model.base_model.model.state_dict()) == set(llama(tied=True).state_dict())


def test_stored_rows_mean_the_same_on_a_base_whose_rows_were_drawn_anew(tmp_path: Path) -> None:
    ids = torch.tensor([[35, 5, 7, 37]])  # new tokens come last; a base is known by its first 32 rows
    model = get_peft_model(llama(), TrainableTokensConfig(token_indices=[35, 37]))
    move(model)
    model.save_pretrained(tmp_path)
    other = llama()
    with torch.no_grad():
        other.model.embed_tokens.weight[[35, 37]] += 5
    again = PeftModel.from_pretrained(other, tmp_path)
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=1e-5)


def test_scaled_embeddings_scale_the_new_rows() -> None:
    """Gemma multiplies what it looks up by sqrt(hidden size)."""

    def gemma() -> Gemma3ForCausalLM:
        torch.manual_seed(0)
        return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, query_pre_attn_scalar=8)).eval()

    model = get_peft_model(gemma(), TrainableTokensConfig(token_indices=[3, 5])).eval()
    move(model)
    rows = model.base_model.model.model.embed_tokens.trainable_tokens_delta["default"]
    expected = by_hand(gemma(), {3: rows[0].detach(), 5: rows[1].detach()})
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("indices", "problem"), [([40], "token 40 is not in"), ([], "names no token"), ([3, 3], "twice"), ([-1], None)]
)
def test_tokens_that_make_no_sense_are_refused(indices: list[int], problem: str | None) -> None:
    if problem is None:
        with pytest.raises(InputError, match="0 or more"):
            TrainableTokensConfig.from_dict({"token_indices": indices})
        return
    base = llama()
    with pytest.raises(InputError, match=problem) as caught:
        get_peft_model(base, TrainableTokensConfig(token_indices=indices))
    assert caught.value.field == "token_indices"
    assert type(base.model.embed_tokens) is torch.nn.Embedding
    if indices:
        with pytest.raises(InputError, match=problem) as caught:
            get_peft_model(base, LoraConfig(trainable_token_indices=indices))
        assert caught.value.field == "trainable_token_indices"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indices", [[3, 5], {"embed_tokens": [3, 5]}])
def test_beside_lora(indices: list[int] | dict, tied: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    model = get_peft_model(llama(tied=tied), config).eval()
    assert torch.equal(model(IDS).logits, llama(tied=tied)(IDS).logits)
    move(model)
    expected = model(IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, llama(tied=tied)(IDS).logits)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        tokens = [key for key in file.keys() if "token_adapter" in key]  # noqa: SIM118
        assert tokens == ["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["trainable_token_indices"] == indices
    again = PeftModel.from_pretrained(llama(tied=tied), tmp_path)
    assert torch.equal(again(IDS).logits, expected)
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_one_adapter_does_not_adapt_a_module_twice() -> None:
    config = LoraConfig(target_modules=["embed_tokens"], trainable_token_indices=[3])
    with pytest.raises(InputError, match="adapted twice"):
        get_peft_model(llama(), config)


def test_peft_s_second_copy_for_a_tied_head_must_agree(tmp_path: Path) -> None:
    model = get_peft_model(llama(tied=True), TrainableTokensConfig(token_indices=[3]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.lm_head.trainable_tokens_delta"
    save_file(tensors | {key: next(iter(tensors.values())).clone()}, path)
    PeftModel.from_pretrained(llama(tied=True), tmp_path)
    save_file(tensors | {key: next(iter(tensors.values())) + 1}, path)
    with pytest.raises(InputError, match=r"differs from base_model\.model\.model\.embed_tokens"):
        PeftModel.from_pretrained(llama(tied=True), tmp_path)


def test_a_tied_head_can_t_follow_and_be_adapted_itself() -> None:
    base = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    config = LoraConfig(target_modules=["q_proj", "lm_head"], trainable_token_indices=[3])
    with pytest.raises(InputError, match=r"lm_head.*tied to model\.embed_tokens"):
        get_peft_model(base, config)
    assert not any("base_layer" in name for name, _ in base.named_modules())


def test_beside_lora_the_tensor_has_pefts_name_and_leaves_no_trace() -> None:
    model = get_peft_model(llama(tied=True), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3]))
    names = [name for name, p in model.named_parameters() if "token" in name and p.requires_grad]
    assert names == ["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"]
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[4]))
    model.set_adapter("second")
    model.delete_adapter("default")
    names = [name for name, _ in model.named_parameters() if "token_adapter" in name]
    assert names == ["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.second"]
    assert not any("default" in name for name, _ in model.named_modules())
