"""The test's end of `server.py`: a user's folder, and `peft` run in it to whatever end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from training.tiny import save_tiny_llama

from peftcli.training.callbacks import read_log

RECIPE = """
model: {name_or_path: base}
adapter: {method: lora, r: 2, target_modules: [q_proj, up_proj], lora_dropout: 0.1}
data: {train: train.jsonl, eval: {split: 0.25}}
training:
  output_dir: run
  per_device_train_batch_size: 3
  gradient_accumulation_steps: 2
  num_train_epochs: 3
  learning_rate: 0.02
  logging_steps: 1
  eval_steps: 3
  save_steps: 1
  save_total_limit: 1
"""
CLOCK = ("tokens_per_second", "memory", "seconds")
RESUME = ("train", "recipe.yaml", "--resume", "auto")


def make_place(folder: Path) -> None:
    """A tiny base, data and a recipe."""
    save_tiny_llama(folder / "base", positions=64)
    rows = [{"prompt": f"what {'is ' * (number % 5)}{number}", "completion": "fine thanks"} for number in range(16)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE)


class Nursery:
    """Forks runs of `peft` from one process that has imported everything."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PEFTCLI_CACHE": "cache"}
        tests = str(Path(__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([tests, *filter(None, [environment.get("PYTHONPATH")])])
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def peft(self, folder: Path, *arguments: str, **how: Any) -> dict[str, Any]:
        """Run the command in `folder`; see server.py for `how` it may end."""
        assert self._server.stdin is not None and self._server.stdout is not None
        request = {"folder": str(folder), "arguments": list(arguments), **how}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        assert "Traceback" not in answer["out"] + answer["err"], answer["err"]
        return answer

    def close(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()


def outcome(run: Path) -> dict[str, Any]:
    """All that a run leaves but what depends on the clock: the curve, the finished adapter, the last checkpoints."""
    files = [path for path in run.rglob("*") if path.is_file() and not path.name.endswith((".json", ".jsonl", ".png"))]
    result = json.loads((run / "result.json").read_text())
    return {
        "log": [{k: v for k, v in row.items() if k not in CLOCK} for row in read_log(run / "log.jsonl")],
        "result": {k: v for k, v in result.items() if k not in CLOCK},
        "config": (run / "adapter_config.json").read_bytes(),
        "names": {str(path.relative_to(run)) for path in run.rglob("*")},
        "files": {str(path.relative_to(run)): path.read_bytes() for path in files},
        "trainers": {path.parent.name: _state(path) for path in run.glob("checkpoint-*/trainer.json")},
    }


def _state(path: Path) -> dict[str, Any]:
    state = json.loads(path.read_text())
    del state["progress"]["seconds"]
    return state
