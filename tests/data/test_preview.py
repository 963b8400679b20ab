"""The text of a sample in spans."""

from __future__ import annotations

import pytest

from data.families import family
from peftcli.data.encoder import Encoder
from peftcli.data.formats import Completion
from peftcli.data.preview import spans


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", [("hello", False), (" world<|im_end|>", True)]),
        ("gemma", [("<bos>hello", False), (" world<eos>", True)]),
        ("mistral", [("<s> hello", False), (" world</s>", True)]),
    ],
)
def test_spans_keep_the_spaces_at_their_edges(name, expected):
    tokenizer = family(name)
    [sample] = Encoder(tokenizer, "assistant").encode(Completion("hello", " world"), "here")
    assert spans(tokenizer, sample) == expected


def test_a_sample_learnt_as_a_whole_is_one_span_behind_its_first_token():
    tokenizer = family("chatml")
    [sample] = Encoder(tokenizer, "all").encode(Completion("", "héllo"), "here")
    assert spans(tokenizer, sample)[-1][1]
    assert "".join(text for text, _ in spans(tokenizer, sample)) == "héllo<|im_end|>"
