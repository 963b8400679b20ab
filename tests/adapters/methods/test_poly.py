"""Poly: which skills a row gets, in every way a batch can reach a layer."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peftcli import PeftModel, PolyConfig, get_peft_model
from peftcli.errors import InputError

IDS = torch.tensor([[3, 5, 7, 1], [9, 3, 2, 5], [4, 4, 6, 8]])
TASKS = torch.tensor([0, 2, 0])


def poly(**given: int) -> PeftModel:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )
    )
    options = {"r": 2, "n_tasks": 3, "n_skills": 2, "n_splits": 2} | given
    model = get_peft_model(base, PolyConfig(target_modules=["q_proj", "down_proj"], init_weights=False, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "module_logits" in name:
                parameter.normal_(std=2)
    return model.eval()


def test_each_row_gets_the_skills_of_its_task() -> None:
    model = poly()
    logits = model(IDS, task_ids=TASKS).logits
    for row, task in enumerate(TASKS):
        alone = model(IDS[row : row + 1], task_ids=task[None]).logits
        torch.testing.assert_close(logits[row], alone[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, model(IDS, task_ids=torch.tensor([1, 1, 1])).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("tasks", "problem"),
    [
        (None, "task_ids should not be None"),
        (torch.tensor([0, 3, 0]), "Only 3 tasks available. Found task id = 3"),
        (torch.tensor([0, -1, 0]), "Only 3 tasks available"),
        (torch.tensor([0, 1]), "2.* tasks for 3 rows"),
        (torch.tensor(1), "tasks for 3 rows"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(tasks: torch.Tensor | None, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        poly()(IDS, task_ids=tasks)


def test_beams_keep_their_row_s_task() -> None:
    model = poly()
    together = model.generate(input_ids=IDS, task_ids=TASKS, num_beams=3, max_new_tokens=4, do_sample=False)
    for row, task in enumerate(TASKS):
        alone = model.generate(
            input_ids=IDS[row : row + 1], task_ids=task[None], num_beams=3, max_new_tokens=4, do_sample=False
        )
        assert torch.equal(together[row], alone[0])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_checkpointing_samples_the_same_mixture_twice(reentrant: bool) -> None:
    """PEFT's Poly loses the tasks before the recomputation; and the samples must be the same both times."""
    model = poly().train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        (model(IDS, task_ids=TASKS).logits ** 2).mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_the_mixture_is_sampled_in_training_only() -> None:
    model = poly(n_splits=1)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    adapter, p = layer.adapters["default"], layer.tensors("default")
    with torch.no_grad():
        p["poly_router.module_logits"].zero_()
    adapter.context.task_ids = torch.zeros(2000, dtype=torch.long)
    assert torch.equal(adapter.mixture(p, 2000), torch.full((2000, 1, 2), 0.5))
    model.train()
    sampled = adapter.mixture(p, 2000)
    torch.testing.assert_close(sampled.sum(-1), torch.ones(2000, 1))
    torch.testing.assert_close(sampled.mean(0), torch.full((1, 2), 0.5), atol=0.05, rtol=0)
    assert sampled.std(0).min() > 0.2
    assert not torch.equal(sampled[0], sampled[1])


def test_there_is_no_single_weight_to_merge() -> None:
    model = poly()
    with pytest.raises(InputError, match="POLY adapters cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(InputError, match="depends on the task"):
        model.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default")
    with pytest.raises(InputError, match="do not divide into 3 parts"):
        poly(n_splits=3)
