"""Where the time of a training step goes, against two floors: its arithmetic and its traffic at this machine's best.

    python -m benchmarks.profile_step            # after make bench, which leaves the base in out/benchmarks

Every tensor operation of a LoRA step is timed (CPU seconds, one thread), and its arithmetic and bytes are counted, by kind. No kind can be quicker
than its arithmetic at the rate of a large product of matrices, nor than its bytes at the rate of a large copy; both
rates are measured here, in the step's precision. Writes `profile.md` and `profile.png`.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: TID253
from torch.utils._pytree import tree_leaves  # noqa: TID253
from torch.utils.flop_counter import flop_registry  # noqa: TID253

from benchmarks.samples import BASE, batches
from benchmarks.step import training_step

RANK = 16
HEAD, FROZEN, ADAPTER, ATTENTION, OTHER = "head", "frozen layers", "adapters", "attention", "elementwise"
PRODUCTS = {"mm", "addmm", "addmm_", "linear"}
BATCHED = {"bmm", "baddbmm", "baddbmm_", "_softmax", "_softmax_backward_data"}


@dataclass
class Total:
    """What the operations of one kind came to: how many, seconds, floating-point operations, bytes read and written."""

    count: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0


class Ledger(TorchDispatchMode):
    """Books every operation that runs inside, backward passes included."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.totals: dict[str, Total] = defaultdict(Total)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        began = time.process_time()
        result = func(*args, **kwargs)
        seconds = time.process_time() - began
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        total = self.totals[self._kind(func, inputs)]
        total.seconds += seconds
        if not func.is_view:
            total.count += 1
            total.bytes += sum(x.numel() * x.element_size() for x in [*inputs, *outputs])
        if "flash_attention_for_cpu" in func.name():
            total.flops += _flash_flops(func.name(), inputs)
        elif (count := flop_registry.get(func._overloadpacket)) is not None:
            total.flops += count(*args, **kwargs, out_val=result)
        return result

    def _kind(self, func: Any, inputs: list[Tensor]) -> str:
        name = func._overloadpacket.__name__
        sizes = {size for x in inputs for size in x.shape}
        if name in PRODUCTS:
            if self.vocabulary in sizes:
                return HEAD
            return ADAPTER if RANK in sizes else FROZEN
        if name in BATCHED or "attention" in name:
            return ATTENTION
        return HEAD if self.vocabulary in sizes else OTHER


def _flash_flops(name: str, inputs: list[Tensor]) -> float:
    """Of causal attention, which torch's registry does not count on CPUs: half of 2 products, of 5 backward."""
    heads, length, width = inputs[1].shape[1:] if "backward" in name else inputs[0].shape[1:]
    return (5 if "backward" in name else 2) * heads * length**2 * width


def rate_of_products(dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations a second of a large product."""
    a, b = torch.rand(size, size, dtype=dtype), torch.rand(size, size, dtype=dtype)
    return 2 * size**3 / _median_time(lambda: a @ b)


def rate_of_copies(megabytes: int = 256) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.rand(megabytes << 18)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_time(lambda: target.copy_(source))


def _median_time(work: Callable[[], Any], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return median(times[1:])


@dataclass(frozen=True)
class Profile:
    """A step: seconds as it is, and what its operations were booked with; the machine's two rates."""

    name: str
    seconds: float
    totals: dict[str, Total]
    flops_rate: float
    bytes_rate: float

    def floors(self, total: Total) -> tuple[float, float]:
        """Seconds of the arithmetic alone, and of the bytes alone."""
        return total.flops / self.flops_rate, total.bytes / self.bytes_rate

    def lines(self) -> list[str]:
        """The table."""
        booked = sum(total.seconds for total in self.totals.values())
        rows = [
            f"### {self.name}: {self.seconds:.2f} s a step",
            f"Rates: {self.flops_rate / 1e9:.0f} Gflop/s in a product of 2048 x 2048, {self.bytes_rate / 1e9:.1f} GB/s in a copy.",
            "",
            "| kind | operations | seconds | arithmetic floor | traffic floor | seconds / larger floor |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for kind, total in self.totals.items():
            arithmetic, traffic = self.floors(total)
            over = total.seconds / max(arithmetic, traffic)
            rows.append(
                f"| {kind} | {total.count} | {total.seconds:.2f} | {arithmetic:.2f} | {traffic:.2f} | {over:.2f} |"
            )
        floors = [max(self.floors(total)) for total in self.totals.values()]
        rows.append(f"| between operations | | {self.seconds - booked:.2f} | | | |")
        rows.append(f"| whole step | | {self.seconds:.2f} | | {sum(floors):.2f} | {self.seconds / sum(floors):.2f} |")
        return rows


def profile(base: Path, dtype: torch.dtype, lengths: list[int]) -> Profile:
    """A LoRA step on samples of so many tokens, measured three times plainly and once with the ledger."""
    from transformers import AutoModelForCausalLM

    import peftcli

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    config = peftcli.LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    step = training_step(peftcli.get_peft_model(model, config), lengths)
    seconds = _median_time(step, repeats=3)
    with Ledger(model.config.vocab_size) as ledger:
        step()
    order = sorted(ledger.totals, key=lambda kind: -ledger.totals[kind].seconds)
    totals = {kind: ledger.totals[kind] for kind in order}
    return Profile(str(dtype).removeprefix("torch."), seconds, totals, rate_of_products(dtype), rate_of_copies())


def draw(profiles: list[Profile], path: Path) -> None:
    """Seconds of each kind beside its two floors."""
    from peftcli.report.figures import new_figure, png

    figure = new_figure(9, 3.2 * len(profiles))
    for axes, shown in zip(figure.subplots(len(profiles), 1, squeeze=False)[:, 0], profiles, strict=True):
        places = list(range(len(shown.totals)))[::-1]
        floors = [shown.floors(total) for total in shown.totals.values()]
        seconds = [total.seconds for total in shown.totals.values()]
        axes.barh([p + 0.27 for p in places], seconds, 0.26, color="#3b7dd8", label="measured")
        axes.barh(places, [arithmetic for arithmetic, _ in floors], 0.26, color="#d8783b", label="arithmetic floor")
        axes.barh(
            [p - 0.27 for p in places], [traffic for _, traffic in floors], 0.26, color="#999999", label="traffic floor"
        )
        axes.set_yticks(places, list(shown.totals))
        axes.set_title(f"{shown.name}: {shown.seconds:.2f} s a step", fontsize=10)
        axes.set_xlabel("seconds")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    path.write_bytes(png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("out/benchmarks") / BASE)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    lengths = [len(ids) for ids, _ in batches("random", 1, 8)]
    profiles = [profile(options.base, dtype, lengths) for dtype in (torch.bfloat16, torch.float32)]
    lines = [
        f"{len(lengths)} samples, {sum(lengths)} tokens, {torch.get_num_threads()} thread(s), torch {torch.__version__}."
    ]
    for shown in profiles:
        lines += ["", *shown.lines()]
    print("\n".join(lines))
    (options.output / "profile.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(profiles, options.output / "profile.png")


if __name__ == "__main__":
    main()
