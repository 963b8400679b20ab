"""Data sets of the hub, by the real client from a server on this machine: fetched once, kept, streamed, refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.conftest import peft
from training.tiny import save_tiny_llama

from data.hub_server import HubServer, serving

SOURCE = "{path: nobody/colours, columns: {prompt: question, completion: answer}}"
RECIPE = """
model: {name_or_path: base}
adapter: {method: lora, r: 4, target_modules: all-linear}
data: {train: [SOURCE], eval: [SOURCE]}
training: {output_dir: run, per_device_train_batch_size: 4, max_steps: 3, logging_steps: 1}
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    for name, count in (("train", 30), ("validation", 4)):
        path = tmp_path / "hub" / "data" / f"{name}-00000.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"question": f"what {name} {number}", "answer": "fine thanks"}) for number in range(count)]
        path.write_text("\n".join(lines) + "\n")
    (tmp_path / "hub" / "README.md").write_text("---\nlicense: mit\n---\n")
    save_tiny_llama(tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("SOURCE", SOURCE))
    with serving(tmp_path / "hub", "nobody/colours") as server:
        yield server


def on(hub: HubServer, folder: Path) -> dict[str, str]:
    """The environment of a user for whom the server is the hub."""
    return {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "hf"),
        "PEFTCLI_CACHE": str(folder / "c"),
    }


def test_a_data_set_of_the_hub_is_opened_once_and_kept(hub: HubServer, tmp_path: Path) -> None:
    shown = peft("train", "recipe.yaml", cwd=tmp_path, **on(hub, tmp_path)).stdout
    assert "nobody/colours (prompt_completion, chat template, 30 rows)" in shown
    assert "eval     4 samples" in shown, "validation is the evaluation data"
    opened = hub.asked.count("README.md")
    assert 0 < opened <= 5, "twice for the names of its splits and itself, for training and evaluation; once fetched"
    assert set(hub.asked) >= {"data/train-00000.jsonl", "data/validation-00000.jsonl"}
    hub.asked.clear()
    shown = peft(
        "train", "recipe.yaml", "--dry-run", cwd=tmp_path, **{**on(hub, tmp_path), "HF_HUB_OFFLINE": "1"}
    ).stdout
    assert "data from cache" in shown and not hub.asked


def test_a_data_set_of_the_hub_is_streamed_and_a_split_it_does_not_have_is_named(
    hub: HubServer, tmp_path: Path
) -> None:
    stream = ["~data.eval", "data.streaming=true", "data.buffer_size=7", "training.max_steps=9"]
    shown = peft("train", "recipe.yaml", *stream, cwd=tmp_path, **on(hub, tmp_path)).stdout
    assert "these are its first 30 rows" in shown and "the data have ended after step" in shown
    assert not list((tmp_path / "hf" / "datasets").rglob("*.arrow")), "nothing is fetched before it is read"
    source = "data.train=[{path: nobody/colours, split: test}]"
    refused = peft("train", "recipe.yaml", source, "--output-dir=2", cwd=tmp_path, code=2, **on(hub, tmp_path)).stderr
    assert "nobody/colours: data.train: is no file or folder here, and can't be loaded" in refused
    assert 'Unknown split "test"' in refused and "validation" in refused


def test_what_the_hubs_client_can_not_read_is_told_with_its_reason(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "hub/data/validation-00000.jsonl").write_text('{"other": 1}\n')
    refused = peft("train", "recipe.yaml", cwd=tmp_path, code=2, **on(hub, tmp_path)).stderr
    assert "there are 1 new columns" in refused or "column names don't match" in refused
