"""Objectives against plain references: what a loss is, and what its sums tell."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tasks import TASKS, make_run
from torch.nn.functional import cross_entropy, logsigmoid

from peftcli import LoraConfig, get_peft_model
from peftcli.data.collate import IGNORED
from peftcli.recipe.schema import PreferenceSection
from peftcli.training.objectives.classes import ClassLoss, TagLoss
from peftcli.training.objectives.preference import DPOLoss, ORPOLoss
from peftcli.training.objectives.spans import best_span
from training.tiny import disturbed, random_batch, tiny_llama


def pairs() -> dict[str, torch.Tensor]:
    """Two batches of different widths, as the two halves of pairs."""
    chosen, rejected = random_batch(4, 11, seed=1), random_batch(4, 8, seed=2)
    for batch in (chosen, rejected):
        batch["labels"][:, 1] = batch["input_ids"][:, 1]  # something is learnt of each
    return {
        **chosen,
        **{f"second_{name}": tensor for name, tensor in rejected.items()},
        "targets": torch.ones(4, 1).long(),
    }


def log_likelihoods(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], prefix: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row, without padding."""
    sums, counts = [], []
    for row in range(4):
        real = batch[f"{prefix}attention_mask"][row].bool()
        ids, labels = batch[f"{prefix}input_ids"][row][real], batch[f"{prefix}labels"][row][real][1:]
        found = -cross_entropy(
            model(input_ids=ids[None]).logits[0, :-1], labels, reduction="none", ignore_index=IGNORED
        )
        sums.append(found.sum())
        counts.append((labels != IGNORED).sum())
    return torch.stack(sums), torch.stack(counts)


def adapted() -> torch.nn.Module:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama(), config).double()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def test_dpo_begins_at_log_2() -> None:
    loss = DPOLoss(adapted(), PreferenceSection(beta=0.3))
    assert float(loss(pairs()).detach()) == pytest.approx(4 * math.log(2), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_what_its_paper_says(smoothing: float) -> None:
    model, batch = disturbed(adapted(), 5), pairs()
    found = DPOLoss(model, PreferenceSection(beta=0.3, label_smoothing=smoothing))(batch)
    found.backward()
    ours = gradients(model)
    with torch.no_grad(), model.disable_adapter():
        reference = [log_likelihoods(model, batch, prefix)[0] for prefix in ("", "second_")]
    policy = [log_likelihoods(model, batch, prefix)[0] for prefix in ("", "second_")]
    margin = 0.3 * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
    expected = (-(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)).sum()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    expected.backward()
    theirs = gradients(model)
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-8)


def test_orpo_is_what_its_paper_says() -> None:
    model, batch = disturbed(adapted(), 5), pairs()
    found = ORPOLoss(model, PreferenceSection(loss="orpo", beta=0.25))(batch)
    chosen, rejected = (sums / counts for sums, counts in (log_likelihoods(model, batch, p) for p in ("", "second_")))
    odds = [likelihood.exp() / (1 - likelihood.exp()) for likelihood in (chosen, rejected)]
    expected = (-chosen - 0.25 * logsigmoid((odds[0] / odds[1]).log())).sum()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_the_reference_leaves_no_trace() -> None:
    model = disturbed(adapted(), 5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    DPOLoss(model, PreferenceSection())(pairs())
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_macro_f1_and_accuracy_by_hand() -> None:
    """Classes 0, 1, 2 of 4; true 0 0 1 2, predicted 0 1 1 1. F1: 2/3, 2/4, 0; class 3 never occurs."""
    sums = [2.0, 4, 2, 1, 1, 0, 0, 1, 3, 0, 0, 2, 1, 1, 0]
    found = ClassLoss(torch.nn.Identity()).metrics(sums)
    assert found == {"eval_loss": 0.5, "eval_accuracy": 0.5, "eval_macro_f1": pytest.approx((2 / 3 + 0.5 + 0) / 3)}


def test_span_f1_by_hand() -> None:
    found = TagLoss(torch.nn.Identity(), ["O"]).metrics([3.0, 6, 3, 1, 2, 4])
    assert found == {"eval_loss": 0.5, "eval_token_accuracy": 0.5, "eval_span_f1": pytest.approx(2 / 6)}


def test_the_best_span_never_ends_before_it_begins() -> None:
    start, end = torch.tensor([[0.0, 1.0, 9.0, 0.0]]), torch.tensor([[9.0, 3.0, 1.0, 2.0]])
    first, last = best_span(start, end)
    candidates = {(i, j): float(start[0, i] + end[0, j]) for i in range(4) for j in range(i, 4)}
    assert (int(first), int(last)) == max(candidates, key=candidates.__getitem__) == (2, 3)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "FEATURE_EXTRACTION"])
def test_accumulation_does_not_change_the_step(name: str, tmp_path: Path) -> None:
    """Batches of 6 and three of 2 give the same adapter. In-batch negatives are meant to depend on the batch."""
    from safetensors.torch import load_file

    from peftcli.cli import main

    found = []
    for size, steps in ((6, 1), (2, 3)):
        folder = tmp_path / str(size)
        folder.mkdir()
        recipe = make_run(
            name, folder, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=3,
            group_by_length=False, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        assert main(["train", str(recipe), "--no-audit"]) == 0
        found.append(load_file(folder / "run/adapter_model.safetensors"))
    assert any(bool(tensor.any()) for key, tensor in found[0].items() if "lora_B" in key)
    for key, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][key], rtol=1e-4, atol=1e-5)
