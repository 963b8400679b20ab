"""Merging needs the memory of the largest tensor, whatever the size of the base: shown by the peak of a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peftcli.adapters.config import CONFIG_NAME
from peftcli.export.merged import INDEX

WIDTH = 1024

MAKE = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file

base, adapter, layers, width = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
base.mkdir(), adapter.mkdir()
names = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in ("self_attn.q_proj", "mlp.up_proj")]
per_file = 16
files, where = [names[i : i + per_file] for i in range(0, len(names), per_file)], {}
for number, group in enumerate(files):
    file = f"model-{number:05}.safetensors"
    save_file({name: torch.full((4 * width if "up" in name else width, width), 0.5, dtype=torch.bfloat16) for name in group}, base / file)
    where |= dict.fromkeys(group, file)
(base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
(base / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaModel"], "tie_word_embeddings": False}))
pairs = {}
for name in names:
    module = name.removesuffix(".weight")
    pairs[f"base_model.model.{module}.lora_A.weight"] = torch.ones(4, width) * 0.25
    pairs[f"base_model.model.{module}.lora_B.weight"] = torch.ones(4 * width if "up" in name else width, 4)
save_file(pairs, adapter / "adapter_model.safetensors")
config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 4, "lora_alpha": 4}
(adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "up_proj"]}))
"""

MERGE = """
import resource, sys
from pathlib import Path
import torch
torch.zeros(8, 8) @ torch.zeros(8, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from peftcli.export.merged import export_merged
export_merged([Path(sys.argv[2])], Path(sys.argv[1]), Path(sys.argv[3]))
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_of_merging(folder: Path, layers: int) -> tuple[int, int, int]:
    """Bytes of the base, and the process's peak in bytes before and after, torch being loaded in both."""
    arguments = [str(folder / name) for name in ("base", "adapter")]
    subprocess.run([sys.executable, "-c", MAKE, *arguments, str(layers), str(WIDTH)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", MERGE, *arguments, str(folder / "m")], check=True, capture_output=True, text=True
    )
    before, after = (int(number) * 1024 for number in done.stdout.split())
    return sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors")), before, after


def check(folder: Path, layers: int, *, at_least: int, at_most: int) -> None:
    size, before, after = peak_of_merging(folder, layers)
    assert size > at_least
    assert after - before < at_most, f"{(after - before) / 1e6:.0f} MB more for a base of {size / 1e6:.0f} MB"
    from safetensors import safe_open

    index = json.loads((folder / "m" / INDEX).read_text())
    name, file = next(iter(index["weight_map"].items()))
    with safe_open(folder / "m" / file, "pt") as opened:
        assert (opened.get_tensor(name) == 1.5).all()  # 0.5 + 4 * 0.25
    assert not (folder / "m" / CONFIG_NAME).exists()


def test_300_megabytes_in_a_tenth(tmp_path: Path) -> None:
    check(tmp_path, 32, at_least=300_000_000, at_most=60_000_000)


@pytest.mark.slow
def test_2_gigabytes(tmp_path: Path) -> None:
    check(tmp_path, 192, at_least=2_000_000_000, at_most=100_000_000)
