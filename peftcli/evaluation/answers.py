"""Questions and expected answers, read from tokenised data, so that prompts are exactly what training saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from peftcli.data.tokens import TokenDataset


@dataclass(frozen=True)
class Answer:
    """One answer of a sample: a run of learnt tokens with something before it.

    Args:
        sample: its index in the data set.
        prompt: [P] int32, every token before the answer; of an encoder-decoder, the encoder's.
        expected: [E] int32, the answer with the token that ends it, if one does.
    """

    sample: int
    prompt: NDArray[np.int32]
    expected: NDArray[np.int32]


def answers(data: TokenDataset) -> list[Answer]:
    """Every answer in the data set, in order.

    Running text, and conversations learnt as a whole, have none: nothing in them is only given.
    """
    found = []
    least = 2 if data.second is None else 1  # the first token is never learnt, and alone it is no question
    for sample in range(len(data)):
        ids, supervised = data[sample]
        edges = np.flatnonzero(np.diff(supervised.astype(np.int8), prepend=0, append=0))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            if start >= least:
                found.append(Answer(sample, ids[:start], ids[start:end]))
    return found


def end_tokens(found: list[Answer], tokenizer: Any) -> list[int]:
    """The control tokens at which generation stops: those that end the expected answers, and end of sequence."""
    control = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {int(answer.expected[-1]) for answer in found} & control
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    return sorted(ends)
