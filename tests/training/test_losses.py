"""The chunked loss is the ordinary loss, for every head, and never holds [tokens x vocabulary]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftcli import LoraConfig, get_peft_model
from peftcli.adapters.registry import config_class
from peftcli.training.losses import CausalLMLoss, linear_cross_entropy, linear_scores
from peftcli.training.unpadded import NAME
from training.tiny import VOCABULARY, random_batch, tiny_llama, tiny_model


def plain_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The reference: all logits, one cross entropy, the model's own attention."""
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME:
        model.config._attn_implementation = "sdpa"
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, reference in theirs.items():
        assert (ours[name] - reference).norm() <= tolerance * reference.norm() + 1e-12, name


class SoftHead(nn.Module):
    """A head with a bias, a low-rank update and a soft cap."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Linear(width, VOCABULARY, dtype=dtype)
        self.a, self.b = nn.Linear(width, 2, False, dtype=dtype), nn.Linear(2, VOCABULARY, False, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh((self.base(hidden) + self.b(self.a(hidden))) / 3) * 3


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-4)])
def test_equals_cross_entropy(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    head = SoftHead(8, dtype)
    hidden = torch.randn(23, 8, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (23,))
    ours = linear_cross_entropy(hidden, labels, head, rows=rows, leaves=list(head.parameters()))
    (ours / 7).backward()
    our_gradients = {"hidden": hidden.grad, **gradients(head)}
    hidden.grad = None
    theirs = functional.cross_entropy(head(hidden), labels, reduction="sum")
    (theirs / 7).backward()
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    assert_same(our_gradients, {"hidden": hidden.grad, **gradients(head)}, tolerance)


def test_no_label_gives_zero_gradients() -> None:
    head = nn.Linear(8, VOCABULARY)
    hidden = torch.randn(0, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.zeros(0, dtype=torch.long), head, leaves=list(head.parameters()))
    loss.backward()
    assert loss == 0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_half_precision_is_as_good_as_torch() -> None:
    """Against the float64 truth, bf16 in chunks errs about as much as bf16 in one piece (each chunk is rounded once)."""
    torch.manual_seed(0)
    head = nn.Linear(64, VOCABULARY, dtype=torch.bfloat16)
    hidden, labels = torch.randn(300, 64, dtype=torch.bfloat16), torch.randint(0, VOCABULARY, (300,))

    def weight_gradient(loss: Tensor, module: nn.Linear) -> Tensor:
        return torch.autograd.grad(loss, module.weight)[0].double()

    exact = nn.Linear(64, VOCABULARY, dtype=torch.float64)
    exact.load_state_dict(head.state_dict())
    truth = weight_gradient(functional.cross_entropy(exact(hidden.double()), labels, reduction="sum"), exact)
    theirs = weight_gradient(functional.cross_entropy(head(hidden).float(), labels, reduction="sum"), head)
    ours = weight_gradient(linear_cross_entropy(hidden, labels, head, rows=16, leaves=[head.weight]), head)
    assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm()


def test_scores() -> None:
    head, hidden, labels = nn.Linear(8, VOCABULARY), torch.randn(50, 8), torch.randint(0, VOCABULARY, (50,))
    loss, correct, count = linear_scores(hidden, labels, head, rows=7).tolist()
    assert loss == pytest.approx(functional.cross_entropy(head(hidden), labels, reduction="sum").item(), rel=1e-5)
    assert correct == (head(hidden).argmax(-1) == labels).sum()
    assert count == 50


ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    ("granite", {"logits_scaling": 4.0}),
    ("cohere", {"logit_scale": 0.25}),
    ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 64, "dropout": 0.0}),
]


@pytest.mark.parametrize(("model_type", "settings"), ARCHITECTURES)
def test_model_loss_is_the_models_own(model_type: str, settings: dict[str, Any]) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": VOCABULARY, "initializer_range": 0.4, "pad_token_id": 0}
    if model_type == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    model = tiny_model(model_type, **{**sizes, **settings}).double().train()
    batch = random_batch()
    loss = CausalLMLoss(model, rows=4)
    ours = loss(batch)
    ours.backward()
    our_gradients = gradients(model)
    reference = plain_loss(model, batch)
    reference.backward()
    assert loss.spares_logits
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=0)
    assert_same(our_gradients, gradients(model), 1e-6)  # some norms compute in float32 whatever the model's type is


class BiasedLogits(nn.Module):
    """A model that does something unheard of with its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama()
        self.bias = nn.Parameter(torch.randn(VOCABULARY))

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        output.logits = output.logits + self.bias
        return output


def test_unknown_tail_uses_the_models_logits() -> None:
    model, batch = BiasedLogits(), random_batch()
    loss = CausalLMLoss(model)
    loss(batch).backward()
    ours = gradients(model)
    plain_loss(model, batch).backward()
    assert not loss.spares_logits
    assert_same(ours, gradients(model), 1e-5)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
def test_virtual_tokens_carry_no_label(method: str) -> None:
    config = config_class(method)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, batch = get_peft_model(tiny_llama(), config).train(), random_batch()
    loss = CausalLMLoss(model)
    ours = loss(batch)
    ours.backward()
    our_gradients = gradients(model)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits = logits[:, -batch["labels"].shape[1] : -1]
    theirs = functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    theirs.backward()
    assert loss.spares_logits
    torch.testing.assert_close(ours, theirs)
    assert_same(our_gradients, gradients(model), 1e-5)


class SharedBank(nn.Module):
    """A head whose trained tensor lives elsewhere, as in VB-LoRA."""

    def __init__(self, head: nn.Linear, bank: nn.Parameter) -> None:
        super().__init__()
        self.head, self.bank = head, (bank,)  # the tuple hides it from parameters()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden) + hidden @ self.bank[0]


def test_head_parameters_kept_elsewhere_are_trained() -> None:
    model, batch = tiny_llama().requires_grad_(False), random_batch()
    bank = nn.Parameter(torch.randn(16, VOCABULARY))
    model.lm_head = SharedBank(model.lm_head, bank)
    CausalLMLoss(model)(batch).backward()
    ours, bank.grad = bank.grad, None
    plain_loss(model, batch).backward()
    torch.testing.assert_close(ours, bank.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_adapted_head(targets: list[str]) -> None:
    """Our own LoRA on the head: also dropout's random state is used once."""
    config = LoraConfig(r=3, target_modules=targets, lora_dropout=0.2, init_lora_weights=False)
    model, batch = get_peft_model(tiny_llama().double(), config, autocast_adapter_dtype=False).train(), random_batch()
    loss = CausalLMLoss(model)
    loss(batch)
    torch.manual_seed(3)
    loss(batch).backward()
    ours = gradients(model)
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    assert loss.spares_logits
    assert ours.keys() == expected
    assert any("lm_head" in name for name in ours)
    model.eval()
    loss(batch).backward()
    ours = gradients(model)
    plain_loss(model, batch).backward()
    assert_same(ours, gradients(model), 1e-9)


def test_probe_leaves_no_trace() -> None:
    """The start-up probe shifts no random state, keeps no gradient and gives the head back."""
    model = tiny_llama()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    CausalLMLoss(model)(random_batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in vars(model.lm_head)
    assert all(p.grad is None for p in model.parameters())


def test_bf16_autocast() -> None:
    model, batch = tiny_llama(), random_batch()
    loss = CausalLMLoss(model, bf16=True, rows=4)
    ours = loss(batch)
    ours.backward()
    assert loss.spares_logits
    assert ours.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(ours, plain_loss(model, batch), rtol=0.03, atol=0)


def test_padding_does_not_change_the_loss() -> None:
    model, batch = tiny_llama().double(), random_batch()
    wider = {
        name: functional.pad(tensor, (0, 5), value=-100 if name == "labels" else 0) for name, tensor in batch.items()
    }
    loss = CausalLMLoss(model)
    torch.testing.assert_close(loss(batch), loss(wider), rtol=1e-12, atol=0)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any tensor had that has a vocabulary dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return out


@pytest.mark.parametrize("score", [False, True])
def test_tokens_by_vocabulary_never_exists(score: bool) -> None:
    model, batch = tiny_llama().requires_grad_(False), random_batch(rows=6, length=40)
    model.model.layers[0].requires_grad_()
    loss = CausalLMLoss(model, rows=8)
    with LargestTensor() as trace:
        result = loss(batch, score=score)
        if not score:
            result.backward()
    # The head's own weight, transposed, is [hidden x vocabulary].
    assert trace.rows <= 16
    assert (batch["labels"] != -100).sum() > 4 * 16
