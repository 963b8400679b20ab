"""`data.packing: bfd`: full rows, samples that never see each other, the same loss, the same run after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from peftcli import LoraConfig, get_peft_model
from peftcli.errors import InputError
from peftcli.recipe.schema import Recipe
from peftcli.training.batches import to_batch
from training.test_losses import plain_loss
from training.tiny import Recorder, random_data, tiny_llama, tiny_model, trainer


def adapted() -> torch.nn.Module:
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.1))


def test_a_step_is_full_rows_and_their_mean_loss(tmp_path: Path) -> None:
    data, rows = random_data(40), Recorder()
    model = tiny_llama()
    settings = {"learning_rate": 1e-9, "per_device_train_batch_size": 2, "num_train_epochs": 1}
    run = trainer(tmp_path, model, train_data=data, row_length=24, callbacks=[rows], **settings)
    windows = [indices for window in run.feed.windows(run.progress) for indices in window]
    assert sorted(index for indices in windows for index in indices) == list(range(40))
    assert all(40 <= sum(data.lengths[indices]) <= 48 for indices in windows[:-1])
    run.train()
    assert run._bare_loss.spares_padding
    logged = [row["loss"] for row in rows.rows if "loss" in row]
    for indices, loss in zip(windows, logged, strict=True):
        batch = to_batch(data, indices, 0, torch.device("cpu"))
        mean = float(plain_loss(model, batch).detach()) / int((batch["labels"] != -100).sum())
        assert loss == pytest.approx(mean, rel=1e-4)


def test_resume_is_bit_identical(tmp_path: Path) -> None:
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "row_length": 24, "learning_rate": 1e-2}
    whole, first, second = adapted(), adapted(), adapted()
    trainer(tmp_path / "whole", whole, **settings).train()
    steps = trainer(tmp_path / "count", adapted(), **settings).total_steps
    part = trainer(tmp_path / "part", first, save_strategy="steps", save_steps=2, save_total_limit=None, **settings)
    part.train()
    with pytest.raises(InputError, match=r"data\.packing"):
        trainer(tmp_path / "part", adapted(), **{**settings, "row_length": None}).train(
            tmp_path / "part" / "checkpoint-2"
        )
    trainer(tmp_path / "part", second, **settings).train(tmp_path / "part" / "checkpoint-2")
    assert steps > 4
    for (name, a), b in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_base_that_cannot_is_refused(tmp_path: Path) -> None:
    bloom = tiny_model("bloom", hidden_size=16, n_layer=1, n_head=2, vocab_size=97, use_cache=False)
    with pytest.raises(InputError, match=r"data\.packing.*bloom|bloom.*data\.packing"):
        trainer(tmp_path, bloom, row_length=24, max_steps=1).train()


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "poly", "lily", "xlora"])
def test_methods_that_need_their_rows_are_refused(method: str) -> None:
    sections = {
        "model": {"name_or_path": "base"},
        "adapter": {"method": method, **({"num_virtual_tokens": 4} if "tuning" in method else {})},
        "data": {"train": "train.jsonl", "packing": "bfd"},
        "training": {"output_dir": "out"},
    }
    with pytest.raises(ValidationError, match="which row"):
        Recipe.model_validate(sections)
    Recipe.model_validate({**sections, "adapter": {"method": "lora"}})
