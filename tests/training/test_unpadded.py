"""Samples laid end to end give the losses and gradients of padded ones, on every model that says it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from peftcli import LoraConfig, get_peft_model
from peftcli.adapters.registry import config_class
from peftcli.training.blocked_attention import BLOCK, KEPT, BlockedAttention
from peftcli.training.loop import checkpoint_activations
from peftcli.training.losses import CausalLMLoss
from peftcli.training.unpadded import NAME
from training.test_losses import assert_same, gradients, plain_loss
from training.tiny import VOCABULARY, random_batch, tiny_llama, tiny_model, trainer

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: list[tuple[str, dict[str, Any], bool]] = [
    ("llama", {}, True),
    ("mistral", {"sliding_window": 200}, True),
    ("mistral", {"sliding_window": 6}, False),  # samples are longer than what a token sees
    ("qwen2", {}, True),
    ("qwen3", {"head_dim": 8}, True),
    ("gemma", {"head_dim": 8}, True),
    ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}, False),  # caps its scores
    ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8}, True),
    ("phi3", {}, True),
    ("deepseek_v3", {**LATENT, **EXPERTS, "num_key_value_heads": 2}, True),
    ("bloom", {}, False),  # counts positions along the row
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, False),  # convolves along it
]


@pytest.mark.parametrize(
    ("model_type", "extra", "able"), MODELS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_equals_the_padded_batch(model_type: str, extra: dict[str, Any], able: bool) -> None:
    model = tiny_model(model_type, **{**SIZES, **extra}).double().train()
    batch = random_batch(rows=4, length=13)
    loss = CausalLMLoss(model, rows=4)
    ours = loss(batch)
    ours.backward()
    our_gradients = gradients(model)
    assert loss.spares_padding == able
    loss.unpadded.release()
    theirs = plain_loss(model, batch)
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert_same(our_gradients, gradients(model), 1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_float32_to_the_digits_promised(checkpointed: bool) -> None:
    """Losses of single samples to 1e-5, gradients of the batch to 5e-4; layers may run again in the backward pass."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    if checkpointed:
        checkpoint_activations(model)
    batch, loss = random_batch(rows=5, length=30), CausalLMLoss(model)
    loss(batch).backward()
    ours = gradients(model)
    with torch.no_grad():
        each = [loss({name: tensor[row : row + 1] for name, tensor in batch.items()}) for row in range(5)]
    loss.unpadded.release()
    plain_loss(model, batch).backward()
    assert loss.spares_padding
    assert_same(ours, gradients(model), 5e-4)
    for row, value in enumerate(each):
        alone = plain_loss(model, {name: tensor[row : row + 1] for name, tensor in batch.items()})
        torch.testing.assert_close(value, alone, rtol=1e-5, atol=0)


def test_a_leak_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof tells a model whose samples see each other, and one that loses its positions."""
    from peftcli.training import unpadded as unpadded_module

    batch, right = random_batch(), unpadded_module.unpadded

    def leaking(batch: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
        inputs, labels = right(batch)
        return {**inputs, "segment_lengths": [sum(inputs["segment_lengths"])]}, labels

    def lost(batch: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
        inputs, labels = right(batch)
        return {**inputs, "position_ids": torch.arange(labels.shape[1]).unsqueeze(0).flip(1)}, labels

    for wrong in (leaking, lost):
        monkeypatch.setattr(unpadded_module, "unpadded", wrong)
        loss = CausalLMLoss(tiny_llama())
        loss(batch)
        assert not loss.spares_padding


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "POLY", "LILY", "ADAPTION_PROMPT"])
def test_adapters_that_look_at_rows_keep_them(method: str) -> None:
    config = config_class(method)(task_type="CAUSAL_LM")
    for name, value in {"num_virtual_tokens": 3, "adapter_layers": 1, "adapter_len": 2, "r": 2}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    loss = CausalLMLoss(get_peft_model(tiny_llama(), config))
    loss(random_batch())
    assert not loss.spares_padding


def test_the_models_own_attention_comes_back(tmp_path: Path) -> None:
    """After training, and after an evaluation; until then a forward pass without samples' lengths is an error."""
    model = tiny_llama()
    run = trainer(tmp_path, model, max_steps=2)
    run.train()
    assert run._bare_loss.spares_padding
    assert model.config._attn_implementation == "sdpa"
    loss, batch = CausalLMLoss(model), random_batch()
    with torch.no_grad():
        loss(batch, score=True)
    assert model.config._attn_implementation == "sdpa"
    loss(batch)
    assert model.config._attn_implementation == NAME
    with pytest.raises(RuntimeError, match="segments"):
        model(batch["input_ids"])
    loss.unpadded.release()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("length", [1, 2, 37, BLOCK, BLOCK + 1, KEPT, KEPT + 1, 3 * BLOCK])
def test_attention_by_blocks_is_attention(length: int) -> None:
    """In bfloat16 as near to the float64 truth as torch's kernel, values and gradients."""
    torch.manual_seed(0)
    exact = [torch.randn(1, heads, length, 16, dtype=torch.float64) for heads in (6, 2, 2)]
    upper = torch.randn(1, length, 6, 16, dtype=torch.float64)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.detach().to(dtype, copy=True).requires_grad_() for x in exact]
        output = function(*inputs)
        output.backward(upper.to(dtype))
        return [output.detach().double(), *(x.grad.double() for x in inputs)]

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return BlockedAttention.apply(q, k, v, 0.3)

    for same, truth in zip(run(ours, torch.float64), run(torchs, torch.float64), strict=True):
        torch.testing.assert_close(same, truth)
    in_half = zip(
        *(run(*case) for case in ((ours, torch.bfloat16), (torchs, torch.bfloat16), (torchs, torch.float64))),
        strict=True,
    )
    for mine, theirs, truth in in_half:
        assert (mine - truth).norm() <= 1.5 * (theirs - truth).norm() + 1e-2 * truth.norm()


def test_bfloat16_gradients_are_as_good() -> None:
    """Against the float32 truth, samples laid end to end in bfloat16 err no more than padded ones do."""
    torch.manual_seed(0)
    exact = tiny_llama(initializer_range=0.1)
    half = tiny_llama(initializer_range=0.1).to(torch.bfloat16)
    exact.load_state_dict(half.state_dict())
    batch = random_batch(rows=6, length=40)
    plain_loss(exact, batch).backward()
    truth = gradients(exact)
    plain_loss(half, batch).backward()
    theirs = gradients(half)
    loss = CausalLMLoss(half)
    loss(batch).backward()
    assert loss.spares_padding
    ours = gradients(half)

    def error(found: dict[str, Tensor]) -> float:
        return sum(float((found[name].float() - truth[name]).norm() ** 2) for name in truth)

    assert error(ours) <= 1.5 * error(theirs)
