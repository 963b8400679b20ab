"""Merging: adapters into one, and an adapter into its base, with `peft merge | export` and with PEFT."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness import Command, Row, Subject, module

LARGE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
"""A 7B Llama. The adapters need no weights of it; the rival's base is allocated and never touched."""

MIDDLE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16}
"""A Llama of 1.4 billion weights, 2.9 GB in bf16."""

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PARENTS = ("first", "second", "third")
WEIGHTS = (0.5, 0.3, 0.2)
RANK = 16
SHARD = 1_000_000_000
"""Bytes of one of the base's files."""


def prepare(work: Path) -> None:
    """Write what the children read, in a child of its own: a process's memory counts as the peak of those it starts."""
    subprocess.run([sys.executable, "-m", "benchmarks.merging", "--side", "ours", "--work", work], check=True)


def _write_all(work: Path) -> None:
    """The three adapters, the base and its adapter; what is there is kept."""
    for name in PARENTS:
        _write_adapter(work / "parents" / name, work / "large", LARGE, seed=PARENTS.index(name))
    _write_config(work / "large", LARGE)
    _write_adapter(work / "middle-adapter", work / "middle", MIDDLE, seed=0)
    _write_base(work / "middle")


def _write_config(folder: Path, sizes: dict[str, int]) -> None:
    from transformers import LlamaConfig

    LlamaConfig(**sizes, vocab_size=32000, dtype="bfloat16").save_pretrained(folder)


def _write_adapter(folder: Path, base: Path, sizes: dict[str, int], *, seed: int) -> None:
    """A LoRA adapter with random factors on every linear layer, as PEFT writes it."""
    import torch
    from safetensors.torch import save_file

    if (folder / "adapter_config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    tensors = {}
    for layer in range(sizes["num_hidden_layers"]):
        for name in MODULES:
            part = "self_attn" if name in MODULES[:4] else "mlp"
            out_features = inner if name in ("gate_proj", "up_proj") else hidden
            in_features = inner if name == "down_proj" else hidden
            key = f"base_model.model.model.layers.{layer}.{part}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, in_features, generator=generator) / 64
            tensors[f"{key}.lora_B.weight"] = torch.randn(out_features, RANK, generator=generator) / 64
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "inference_mode": True}
    config |= {"target_modules": list(MODULES), "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _write_base(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").exists():
        return
    model = LlamaForCausalLM._from_config(LlamaConfig(**MIDDLE, vocab_size=32000), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=SHARD)


def _rival_merges(work: Path, out: Path, kind: str) -> None:
    """PEFT's way to one adapter of three: a model to hold them, `add_weighted_adapter`, save."""
    import torch
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig.from_pretrained(work / "large"))
    model: Any = PeftModel.from_pretrained(base.to_empty(device="cpu"), work / "parents" / PARENTS[0], PARENTS[0])
    for name in PARENTS[1:]:
        model.load_adapter(work / "parents" / name, name)
    density = 0.5 if kind == "ties" else None
    model.add_weighted_adapter(list(PARENTS), list(WEIGHTS), "merged", combination_type=kind, density=density)
    model.save_pretrained(out, selected_adapters=["merged"])


def _rival_exports(work: Path, out: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(work / "middle", dtype=torch.bfloat16)
    merged: Any = PeftModel.from_pretrained(base, work / "middle-adapter").merge_and_unload()
    merged.save_pretrained(out, max_shard_size=SHARD)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=("ours", "rival"), required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kind", help="a combination type, or `base` for merging into the base")
    options = parser.parse_args()
    if options.side == "ours":
        _write_all(options.work)
    elif options.kind == "base":
        _rival_exports(options.work, options.out)
    else:
        _rival_merges(options.work, options.out, options.kind)


def _ours(kind: str, space: Literal["factors", "delta"] = "factors") -> Command:
    density = ("--density", "0.5") if kind == "ties" else ()
    parents = [f"{{work}}/parents/{name}" for name in PARENTS]
    options = ("--weights", ",".join(map(str, WEIGHTS)), "--space", space, *density)
    return Command("ours", ("-m", "peftcli", "merge", *parents, "--method", kind, *options, "-o", "{out}/merged"))


def _rival(kind: str) -> Command:
    return module("rival", "merging", "--out", "{out}/merged", "--kind", kind)


INTO_BASE = Command(
    "ours",
    (
        "-m",
        "peftcli",
        "export",
        "{work}/middle-adapter",
        "--to",
        "merged",
        "--base",
        "{work}/middle",
        "-o",
        "{out}/merged",
    ),
)
COPY = Command("tool", ("cp", "-r", "{work}/middle", "{out}/copy"))

SUBJECTS = [
    Subject(
        "Three adapters (r=16, a 7B's shapes) into one",
        [
            *(
                Row(f"{kind}, whole command (CPU s)", "cpu", _ours(kind), _rival(kind), 5.0, quick=kind == "ties")
                for kind in ("linear", "cat", "ties")
            ),
            Row(
                "svd of the updates, whole command (CPU s)", "cpu", _ours("svd", "delta"), None, 3.0, "less", quick=True
            ),
        ],
        prepare,
        "Factor space, where both compute the same. PEFT's dense SVD of these takes hours and was not run.",
    ),
    Subject(
        "An adapter into its base (1.4B, bf16, sharded)",
        [
            Row("time (CPU s)", "cpu", INTO_BASE, _rival("base"), 3.0, quick=True),
            Row("peak memory (MB)", "peak", INTO_BASE, _rival("base"), 8.0, quick=True),
            Row("time against cp (CPU s)", "cpu", INTO_BASE, COPY, 3.0, "less"),
        ],
        prepare,
    ),
]

if __name__ == "__main__":
    main()
