"""Whether we compute what PEFT computes: the gradients of one batch, float32, from the same adapter file on both sides.

Ours leaves padding out, takes logits in chunks and makes activations again; PEFT runs the padded batch and torch's cross
entropy. The row is |ours - PEFT's| over |PEFT's|, all trained tensors together, and of the worst tensor.
Run as a child: `python -m benchmarks.gradients --side rival ...`, then `--side ours`, which reads what the rival wrote.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, Subject, module, report
from benchmarks.samples import BASE, batches
from benchmarks.training import prepare as prepare_base

ADAPTER, GRADIENTS = "gradients-adapter", "gradients.safetensors"
ROWS = 4
OURS, RIVAL = module("ours", "gradients"), module("rival", "gradients")


def prepare(work: Path) -> None:
    """The base, and an adapter whose B is not zero; in a child, since memory of this process counts for its children."""
    prepare_base(work)
    if not (work / ADAPTER).is_dir():
        subprocess.run([sys.executable, "-m", "benchmarks.gradients", "--side", "prepare", "--work", work], check=True)


SUBJECTS = [
    Subject(
        "Gradients",
        [
            Row("difference of the gradients, over PEFT's norm (ratio)", "norm", OURS, RIVAL, 5e-4, "less", quick=True),
            Row("the same, of the worst tensor (ratio)", "worst", OURS, None, 5e-4, "less", quick=True),
        ],
        prepare,
        f"One batch of {ROWS} samples, float32, one adapter file on both sides; norms over all trained tensors.",
    )
]


def batch() -> Any:
    """Ids, mask and labels, padded on the right."""
    import torch

    samples = batches("random", 1, ROWS)
    width = max(len(ids) for ids, _ in samples)
    ids = torch.zeros(ROWS, width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (tokens, learnt) in enumerate(samples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.tensor([t if keep else -100 for t, keep in zip(tokens, learnt, strict=True)])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: Any) -> dict[str, Any]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def write_adapter(work: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import peftcli

    torch.manual_seed(0)
    config = peftcli.LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    base = AutoModelForCausalLM.from_pretrained(work / BASE, dtype="float32")
    peftcli.get_peft_model(base, config).save_pretrained(work / ADAPTER)


def run_rival(model: Any, work: Path) -> None:
    from safetensors.torch import save_file
    from torch.nn.functional import cross_entropy

    given = batch()
    labels = given.pop("labels")
    logits = model(**given).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    found = gradients(model)
    save_file(found, work / GRADIENTS)
    report(norm=_norm(found.values()))


def run_ours(model: Any, work: Path) -> None:
    from safetensors.torch import load_file

    from peftcli.training.losses import CausalLMLoss
    from peftcli.training.sparing import sparing

    given, theirs = batch(), load_file(work / GRADIENTS)
    with sparing(model):
        (CausalLMLoss(model)(given) / (given["labels"][:, 1:] != -100).sum()).backward()
    ours = gradients(model)
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"other tensors are trained: {sorted(ours.keys() ^ theirs.keys())[:4]}")
    apart = {name: ours[name] - theirs[name] for name in ours}
    worst = max(float(apart[name].norm() / theirs[name].norm()) for name in ours)
    report(norm=_norm(apart.values()), worst=worst)


def _norm(tensors: Any) -> float:
    return sum(float(tensor.double().norm()) ** 2 for tensor in tensors) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=("ours", "rival", "prepare"), required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    if options.side == "prepare":
        write_adapter(options.work)
        return
    from transformers import AutoModelForCausalLM

    library = importlib.import_module("peftcli" if options.side == "ours" else "peft")
    base = AutoModelForCausalLM.from_pretrained(options.work / BASE, dtype="float32")
    model = library.PeftModel.from_pretrained(base, options.work / ADAPTER, is_trainable=True).train()
    (run_ours if options.side == "ours" else run_rival)(model, options.work)


if __name__ == "__main__":
    main()
