"""The recipes of the shared corpus: taken or refused as its index says, each refusal naming the field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftcli.adapters.registry import METHODS
from peftcli.errors import InputError
from peftcli.recipe.load import load_recipe

NEEDS = {"r_dora_ia3": "IA3", "r_prompt_targets": "PROMPT_TUNING"}


def test_corpus(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [row for row in json.loads((shared / "corpus/index.json").read_text()) if row["kind"] == "recipe"]
    assert len(rows) > 60
    for row in rows:
        if NEEDS.get(row["id"], "LORA") not in METHODS:
            continue
        try:
            load_recipe(shared / "corpus" / row["path"])
        except InputError as error:
            assert row["must"] != "accept", f"{row['id']}: {error}"
            text = str(error).lower()
            for name in row["names"] if row["must"] == "reject" else ():
                assert any(word.lower() in text for word in name.split("|")), f"{row['id']} lacks {name}: {error}"
            assert len(text) < 16_000 and "\x1b" not in text
        else:
            assert row["must"] != "reject", row["id"]
        assert not row.get("canary") or not Path(row["canary"]).exists()
