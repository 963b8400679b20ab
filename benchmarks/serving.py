"""Adapters at work: what an unmerged LoRA and a mixed batch cost, and what the n-th adapter costs to attach, save and load.

Ratios within one process, base and adapters in turn, so that a change of load hits all alike.
"""

from __future__ import annotations

import argparse
import copy
import gc
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import Row, Subject, module, report
from benchmarks.training import prepare

ADAPTERS = 16
TURNS = 5
"""Of the second adapter and the last."""

OVERHEAD, GROWTH = module("ours", "serving", "--what", "overhead"), module("ours", "serving", "--what", "growth")
RIVAL_GROWTH = module("rival", "serving", "--what", "growth")

SUBJECTS = [
    Subject(
        "Adapters at work",
        [
            Row("unmerged LoRA, forward pass over the base's (ratio)", "one", OVERHEAD, None, 1.10, "less"),
            Row("4 adapters mixed in one batch, over the base's (ratio)", "mixed", OVERHEAD, None, 1.25, "less"),
            Row(f"attaching adapter {ADAPTERS} over the second (ratio)", "attach", GROWTH, None, 1.3, "less"),
            Row(f"loading adapter {ADAPTERS} over the second (ratio)", "load", GROWTH, None, 1.3, "less"),
            Row(f"saving an adapter of {ADAPTERS} over one of 2 (ratio)", "save", GROWTH, None, 1.3, "less"),
            Row(f"loading adapter {ADAPTERS}: against PEFT", "load_seconds", GROWTH, RIVAL_GROWTH, 1.0),
        ],
        prepare,
        "bfloat16, 8 rows of 256 tokens for the first two rows; LoRA r=16 on all linear layers of SmolLM2-135M.",
    )
]


def timed(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def overhead(library: Any, base: Any) -> None:
    """Forward passes of the base, of one adapter, and of four in one batch."""
    import torch

    model = library.get_peft_model(base, config(library)).eval()
    names = ["default", "a", "b", "c"]
    for name in names[1:]:
        model.add_adapter(name, config(library))
    ids = torch.randint(100, 49000, (8, 256))
    rows = [names[row % 4] for row in range(8)]
    seconds: dict[str, list[float]] = {"base": [], "one": [], "mixed": []}
    with torch.no_grad():
        for _ in range(6):
            with model.disable_adapter():
                seconds["base"].append(timed(lambda: model(ids)))
            seconds["one"].append(timed(lambda: model(ids)))
            seconds["mixed"].append(timed(lambda: model(ids, adapter_names=rows)))
    best = {name: median(values[1:]) for name, values in seconds.items()}
    report(one=best["one"] / best["base"], mixed=best["mixed"] / best["base"])


def growth(library: Any, base: Any) -> None:
    """The second adapter of one model and the last of another, in turn: attached, saved, deleted, loaded, deleted.

    Measured one after the other as a model fills up, the two ends would meet the machine under different loads, and
    Python's full garbage collection, as long as two saves, would fall on whichever call it is due in. It runs before
    each call here, outside the time.
    """
    few, many = (library.get_peft_model(model, config(library)) for model in (base, copy.deepcopy(base)))
    for number in range(2, ADAPTERS):
        many.add_adapter(f"n{number}", config(library))
    seconds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        few.save_pretrained(folder)
        for _ in range(TURNS + 1):
            for size, model in (("few", few), ("many", many)):
                for what, work in (
                    ("attach", lambda: model.add_adapter("last", config(library))),  # noqa: B023
                    ("save", lambda: model.save_pretrained(f"{folder}/out", selected_adapters=["last"])),  # noqa: B023
                    ("delete", lambda: model.delete_adapter("last")),  # noqa: B023
                    ("load", lambda: model.load_adapter(folder, "last")),  # noqa: B023
                    ("delete", lambda: model.delete_adapter("last")),  # noqa: B023
                ):
                    gc.collect()
                    seconds[f"{what} {size}"].append(timed(work))
    turns = {name: values[1:] for name, values in seconds.items()}  # the first calls import, and fill caches
    grown = {
        what: median(b / a for a, b in zip(turns[f"{what} few"], turns[f"{what} many"], strict=True))
        for what in ("attach", "save", "load")
    }
    report(**grown, load_seconds=median(turns["load many"]))


def config(library: Any) -> Any:
    return library.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=("ours", "rival"), required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--what", choices=("overhead", "growth"), required=True)
    options = parser.parse_args()
    import importlib

    from transformers import AutoModelForCausalLM

    library = importlib.import_module("peftcli" if options.side == "ours" else "peft")
    base = AutoModelForCausalLM.from_pretrained(options.work / "base", dtype="bfloat16")
    (overhead if options.what == "overhead" else growth)(library, base)


if __name__ == "__main__":
    main()
