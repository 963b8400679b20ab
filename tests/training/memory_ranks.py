"""Run by torchrun in test_shared_base.py: how much of a base two processes hold while it is loaded, adapted and sharded."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from peftcli import get_peft_model
from peftcli.recipe.load import load_recipe
from peftcli.training.losses import CausalLMLoss
from peftcli.training.optimizers import build_optimizer
from peftcli.training.strategies import make_strategy


def own_bytes() -> int:
    """Resident bytes that no other process shares, pages of files left out."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


class Peak(threading.Thread):
    """Watches `own_bytes` until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = own_bytes()
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(0.001):
            self.most = max(self.most, own_bytes())

    def stop(self) -> int:
        self._stop_asked.set()
        self.join()
        return self.most - self.before


def main(folder: Path) -> None:
    found = {}
    for run in sorted(path for path in folder.iterdir() if path.is_dir()):
        recipe = load_recipe(run / "recipe.yaml", check_paths=False)
        strategy = make_strategy(recipe, run)
        peak = Peak()
        peak.start()
        assert recipe.adapter.config is not None
        model = get_peft_model(strategy.load_base(recipe.model, recipe.quantization), recipe.adapter.config)
        strategy.prepare(model, CausalLMLoss(model), lambda m=model, r=recipe: build_optimizer(m, r.training))
        gc.collect()
        found[run.name] = {"peak": peak.stop(), "held": own_bytes() - peak.before}
        strategy.finish()
        del model, strategy
        gc.collect()
    rank = os.environ["RANK"]
    (folder / f"memory-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
