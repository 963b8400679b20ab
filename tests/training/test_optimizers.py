"""Optimizers, their parameter groups and the schedules."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from peftcli.errors import InputError
from peftcli.training.optimizers import build_optimizer, build_scheduler, loraplus_groups, plain_groups
from peftcli.training.schedule import warmup_steps
from training.tiny import settings


class Adapted(nn.Module):
    """A module with PEFT's names."""

    def __init__(self, with_b: bool = True) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(3, 2, bias=False)})
        if with_b:
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=True)})
        self.lora_embedding_B = nn.ParameterDict({"default": nn.Parameter(torch.zeros(3, 2))})
        self.head_lora_Big = nn.Linear(2, 2, bias=False)  # a name that only looks like a B matrix


def by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_loraplus_groups() -> None:
    model = Adapted()
    assert by_name(model, loraplus_groups(model, 1e-3, 16, weight_decay=0.1)) == {
        "lora_A.default.weight": (1e-3, 0.1),
        "head_lora_Big.weight": (1e-3, 0.1),
        "lora_embedding_B.default": (1e-6, 0.1),
        "lora_B.default.weight": (1.6e-2, 0.1),
        "lora_B.default.bias": (1.6e-2, 0.0),
    }


def test_loraplus_needs_b_matrices() -> None:
    with pytest.raises(InputError, match="loraplus_lr_ratio"):
        loraplus_groups(Adapted(with_b=False), 1e-3, 16)


def test_vectors_do_not_decay() -> None:
    model = Adapted()
    groups = by_name(model, plain_groups(model, 1e-3, 0.1))
    assert {name for name, (_, decay) in groups.items() if not decay} == {"lora_B.default.bias"}


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_optimizers_step(name: str) -> None:
    model = Adapted()
    optimizer = build_optimizer(model, settings(optim=name, loraplus_lr_ratio=4.0, adam_beta2=0.95))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert moved == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    if "adamw" in name:
        assert optimizer.defaults["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_missing_bitsandbytes_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"bitsandbytes.*\n.*pip install"):
        build_optimizer(Adapted(), settings(optim=name))


def rates(steps: int, **values: Any) -> list[float]:
    model = Adapted()
    chosen = settings(learning_rate=1.0, **values)
    optimizer = build_optimizer(model, chosen)
    scheduler = build_scheduler(optimizer, chosen, steps)
    seen = []
    for _ in range(steps):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1, 1, 1, 1]),
        ("constant_with_warmup", [0, 0.5, 1, 1]),
        ("linear", [0, 0.5, 1, 0.5]),
        ("cosine", [0, 0.5, 1, 0.5]),
    ],
)
def test_schedules(name: str, expected: list[float]) -> None:
    assert rates(4, lr_scheduler_type=name, warmup_steps=2) == pytest.approx(expected)


@pytest.mark.parametrize(
    "values",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.25}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 0.25}},
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"lr_scheduler_type": "inverse_sqrt"},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}},
    ],
)
def test_other_schedules_run(values: dict[str, Any]) -> None:
    seen = rates(6, warmup_steps=1, **values)
    assert seen[0] == 0
    assert max(seen) == 1


def test_the_least_rate_is_relative_to_the_peak() -> None:
    seen = rates(50, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 0.25})
    assert min(seen) == pytest.approx(0.25, abs=1e-2)


def test_a_schedule_refuses_what_it_does_not_take() -> None:
    with pytest.raises(InputError, match=r"lr_scheduler_kwargs.*linear"):
        rates(3, lr_scheduler_type="linear", lr_scheduler_kwargs={"min_lr": 0.1})


def test_warmup_steps_win_over_the_ratio() -> None:
    assert warmup_steps(settings(warmup_ratio=0.1), 95) == 10
    assert warmup_steps(settings(warmup_ratio=0.1, warmup_steps=3), 95) == 3
