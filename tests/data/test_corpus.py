"""The data sets of the shared corpus, each accepted or refused as its index says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from peftcli.data.audit import require_sound
from peftcli.data.prepare import prepare
from peftcli.errors import InputError
from peftcli.recipe.schema import DataSection


def test_every_data_set_is_judged_right(shared, tmp_path):
    corpus = shared / "corpus"
    tokenizer = AutoTokenizer.from_pretrained(corpus / "bases" / "good_base")
    wrong = {}
    cases = [case for case in json.loads((corpus / "index.json").read_text()) if case["kind"] == "dataset"]
    assert cases
    for case in cases:
        data = DataSection.model_validate({"train": str(corpus / case["path"]), "max_length": 64})
        try:
            require_sound(prepare(data, tokenizer, folder=tmp_path, seed=1, vocab_size=64).report)
            verdict, said = "accept", ""
        except InputError as error:
            verdict, said = "reject", str(error).lower()
        named = all(any(word.lower() in said for word in name.split("|")) for name in case["names"])
        canary = Path(case.get("canary", os.devnull + "/none"))
        if case["must"] not in (verdict, "either") or (case["must"] == "reject" and not named) or canary.exists():
            wrong[case["id"]] = (case["must"], verdict, said)
    assert not wrong


def test_a_base_with_a_hostile_template_is_refused(shared, tmp_path):
    corpus = shared / "corpus"
    tokenizer = AutoTokenizer.from_pretrained(corpus / "bases" / "b_chat_template_escape")
    data = DataSection.model_validate({"train": str(corpus / "datasets" / "d_ok_pc" / "train.jsonl")})
    with pytest.raises(InputError, match="chat template fails: access to attribute '__class__'"):
        prepare(data, tokenizer, folder=tmp_path, seed=1)
