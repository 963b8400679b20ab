"""A sample as a reader sees it: its text in spans that are learnt or not, for `peft train --dry-run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftcli.lazy import numpy as np

if TYPE_CHECKING:
    from peftcli.data.tokens import Sample


def spans(tokenizer: Any, sample: Sample) -> list[tuple[str, bool]]:
    """The text of `sample`, control tokens included, as `(text, learnt)` by turns.

    A span is what its tokens add to the decoded text, so that spaces at its edges are kept. It is foreign text: print
    it through `errors.printable`.
    """
    ids, supervised = sample
    borders = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(ids)]
    texts = [tokenizer.decode(ids[:border].tolist(), clean_up_tokenization_spaces=False) for border in borders]
    return [
        (text[len(before) :], bool(supervised[start]))
        for before, text, start in zip(texts, texts[1:], borders, strict=False)
    ]
