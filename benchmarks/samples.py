"""What is trained on: samples whose lengths are spread as those of natural texts, the same ones for both sides."""

from __future__ import annotations

import random

BASE = "base"
"""Folder of the base model in the folder for files."""

LONGEST, VOCABULARY = 512, 49152


def samples(count: int, *, longest: int = LONGEST, seed: int = 0) -> list[tuple[list[int], list[bool]]]:
    """(token ids, whether each is learnt) of `count` samples.

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
