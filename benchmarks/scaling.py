"""How time and memory of a LoRA step grow: with sequence length, rank, adapters, adapted modules, and size of the base.

    python -m benchmarks.scaling            # after make bench, which leaves the base in out/benchmarks; minutes

Each point is a child process: seconds of CPU, median of three steps, and megabytes above the loaded model. The slope is
that of the curve's second half on logarithmic axes: 1 is linear. Writes `scaling.md` and `scaling.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import Machine, module, report, watched
from benchmarks.samples import BASE


@dataclass(frozen=True)
class Curve:
    """One thing that grows.

    Attributes:
        name: the option of the child that sets it.
        what: the axis' label.
        values: the option's values.
    """

    name: str
    what: str
    values: Sequence[int]


CURVES = (
    Curve("length", "tokens of the one sample", (128, 256, 512, 1024, 2048)),
    Curve("rank", "rank", (4, 16, 64, 256)),
    Curve("adapters", "adapters attached, one active", (1, 4, 16)),
    Curve("layers", "adapted layers, 7 modules each", (1, 5, 15, 30)),
    Curve("width", "width of a base of 8 layers", (256, 512, 1024, 2048)),
)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One point: seconds of a step, and memory above the model's."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    import peftcli
    from benchmarks.step import training_step

    if options.width:
        heads = options.width // 64
        shape = LlamaConfig(
            hidden_size=options.width,
            intermediate_size=options.width * 8 // 3,
            num_hidden_layers=8,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=8192,
        )
        model: Any = AutoModelForCausalLM.from_config(shape, dtype="bfloat16")
    else:
        model = AutoModelForCausalLM.from_pretrained(options.work / BASE, dtype="bfloat16")
    layers = list(range(model.config.num_hidden_layers))[-options.layers :] if options.layers else None
    config = peftcli.LoraConfig(
        r=options.rank,
        lora_alpha=32,
        target_modules="all-linear",
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
    adapted = peftcli.get_peft_model(model, config)
    for number in range(1, options.adapters):
        adapted.add_adapter(f"n{number}", config)
    step = training_step(adapted, [options.length])
    measured: dict[str, Any] = {}
    with watched(measured):
        times = []
        for _ in range(4):
            began = time.process_time()
            step()
            times.append(time.process_time() - began)
    return {"seconds": median(times[1:]), "memory": measured["memory"]}


def slope(values: Sequence[int], measured: Sequence[float]) -> float:
    """Of the last two points on logarithmic axes."""
    return math.log(measured[-1] / measured[-2]) / math.log(values[-1] / values[-2])


def write(results: dict[Curve, list[dict[str, float]]], folder: Path) -> None:
    """The tables and the picture."""
    from peftcli.report.figures import new_figure, png

    lines, figure = [], new_figure(14, 5.5)
    axes = figure.subplots(2, len(results), squeeze=False)
    for column, (curve, points) in enumerate(results.items()):
        lines += [f"### {curve.what}", "| | " + " | ".join(map(str, curve.values)) + " | slope |"]
        lines += ["|---|" + "---:|" * (len(curve.values) + 1)]
        for row, (name, unit) in enumerate((("seconds", "CPU s"), ("memory", "MB"))):
            measured = [point[name] for point in points]
            cells = " | ".join(f"{value:.3g}" for value in measured)
            lines.append(f"| {name} ({unit}) | {cells} | {slope(curve.values, measured):.2f} |")
            plot = axes[row, column]
            plot.plot(curve.values, measured, "o-", color="#3b7dd8")
            plot.set_xlabel(curve.what, fontsize=8)
            plot.set_ylabel(f"{name} ({unit})", fontsize=8)
            plot.set_xlim(0, 1.1 * curve.values[-1])
            plot.set_ylim(0, 1.1 * max(measured))
            plot.spines[["top", "right"]].set_visible(False)
        lines.append("")
    (folder / "scaling.md").write_text("\n".join(lines), encoding="utf-8")
    (folder / "scaling.png").write_bytes(png(figure))
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", help=argparse.SUPPRESS)  # a child's
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"), help="folder with the base")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=1)
    parser.add_argument("--layers", type=int, default=0, help="adapt the last ones; 0: all")
    parser.add_argument("--width", type=int, default=0, help="of a random base; 0: SmolLM2-135M")
    options = parser.parse_args()
    if options.side:
        report(**measure(options))
        return
    machine = Machine(options.work.resolve(), Path())
    results = {}
    for curve in CURVES:
        results[curve] = [
            machine.run(module("ours", "scaling", f"--{curve.name}", str(value))) for value in curve.values
        ]
        print(curve.what, json.dumps(results[curve]), flush=True)
    write(results, options.output)


if __name__ == "__main__":
    main()
