"""What is trained on: samples whose lengths are spread as those of natural texts, the same ones for both sides."""

from __future__ import annotations

import random
from typing import Literal

BASE = "base"
"""Folder of the base model in the folder for files."""

LONGEST, VOCABULARY = 512, 49152

Sample = tuple[list[int], list[bool]]
"""Token ids, and whether each is learnt."""

Batches = Literal["random", "grouped"]


def batches(kind: Batches, count: int, rows: int) -> list[Sample]:
    """Samples that make `count` batches of `rows`, taken in this order.

    `random` is any order. `grouped` is what grouping by length comes to: Trainer's `group_by_length` sorts chunks of 50
    batches, so here 50 batches are sorted and `count` of them taken, spread evenly from the longest to the shortest.
    """
    if kind == "random":
        return samples(count * rows)
    chunk = sorted(samples(50 * rows), key=lambda sample: -len(sample[0]))
    starts = [rows * (50 * (2 * number + 1) // (2 * count)) for number in range(count)]
    return [sample for start in starts for sample in chunk[start : start + rows]]


def samples(count: int, *, longest: int = LONGEST, seed: int = 0) -> list[Sample]:
    """`count` samples.

    Lengths are log-normal with a median of 160 tokens, cut at `longest`, as instruction data are (mean ~200, a few at
    the limit); the last 70 % of each sample are learnt. The tokens are random: time does not depend on which they are.
    """
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        length = min(longest, max(16, round(chance.lognormvariate(5.075, 0.65))))
        ids = [chance.randrange(100, VOCABULARY) for _ in range(length)]
        made.append((ids, [place >= 0.3 * length for place in range(length)]))
    return made
