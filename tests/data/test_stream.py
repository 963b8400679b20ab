"""A stream's chunks: every row once an epoch, in turn, the same from wherever reading begins; what it can't have is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.families import family
from peftcli.data.prepare import prepare
from peftcli.data.sources import STREAM_AUDITED
from peftcli.data.stream import Stream
from peftcli.errors import InputError
from peftcli.recipe.load import load_recipe
from peftcli.recipe.schema import DataSection


def write(path: Path, name: str, count: int) -> str:
    rows = [{"prompt": f"what {number} {name}", "completion": "fine"} for number in range(count)]
    (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path / f"{name}.jsonl")


def section(*paths: str, buffer_size: int = 4, **fields: Any) -> DataSection:
    return DataSection.model_validate(
        {"train": [{"path": path} for path in paths], "streaming": True, "buffer_size": buffer_size, **fields}
    )


def asked(stream: Stream, epoch: int, number: int) -> tuple[list[str], bool]:
    """`7 a` for each sample of a chunk, and whether it is the last."""
    dataset, last = stream.chunk(epoch, number)
    texts = [family("chatml").decode(dataset[index][0]) for index in range(len(dataset))]
    return [text.split("what ")[1].split("<")[0].strip() for text in texts], last


def epoch_of(stream: Stream, epoch: int) -> list[list[str]]:
    found, last = [], False
    while not last:
        names, last = asked(stream, epoch, len(found))
        found.append(names)
    return found


def test_every_row_comes_once_an_epoch_those_of_several_sources_in_turn(tmp_path: Path) -> None:
    data = section(write(tmp_path, "one", 5), write(tmp_path, "two", 2))
    stream = Stream(data, family("chatml"))
    chunks = [["0 one", "0 two", "1 one", "1 two"], ["2 one", "3 one", "4 one"]]
    assert [epoch_of(stream, epoch) for epoch in range(3)] == [chunks] * 3
    assert asked(Stream(data, family("chatml")), 7, 1) == (chunks[1], True)  # as after a resume


def test_rows_come_as_often_as_their_sources_weigh_the_same_after_a_resume(tmp_path: Path) -> None:
    paths = write(tmp_path, "one", 3), write(tmp_path, "two", 5), write(tmp_path, "three", 3)
    weights = (2, 0.4, 1.5)
    sources = [{"path": path, "weight": weight} for path, weight in zip(paths, weights, strict=True)]
    data = DataSection.model_validate({"train": sources, "streaming": True, "buffer_size": 4})
    chunks = epoch_of(Stream(data, family("chatml")), 0)
    assert [len(chunk) for chunk in chunks] == [4, 4, 4, 1]
    counts = Counter(name for chunk in chunks for name in chunk)
    assert [counts[f"{number} one"] for number in range(3)] == [2, 2, 2]
    assert [counts[f"{number} two"] for number in range(5)] == [0, 1, 0, 1, 0]
    assert [counts[f"{number} three"] for number in range(3)] == [2, 1, 2]
    for number, chunk in enumerate(chunks):
        assert asked(Stream(data, family("chatml")), 0, number) == (chunk, number == 3)


def test_a_full_last_chunk_is_known_to_be_the_last(tmp_path: Path) -> None:
    stream = Stream(section(write(tmp_path, "one", 8)), family("chatml"))
    assert [len(chunk) for chunk in epoch_of(stream, 0)] == [4, 4]


def test_no_more_is_read_than_is_needed(tmp_path: Path) -> None:
    """A bad row is met when it is its turn, and named; passing over it reads it, too."""
    path = write(tmp_path, "one", 9)
    with open(path, "a") as file:
        file.write("{\n")
    stream = Stream(section(path), family("chatml"))
    assert len(asked(stream, 0, 0)[0]) == 4
    stream.chunk(0, 1)
    for broken in (lambda: stream.chunk(0, 2), lambda: Stream(section(path), family("chatml")).chunk(0, 9)):
        with pytest.raises(InputError, match=r"one.jsonl:10: data.train: "):
            broken()


def test_formats_are_those_of_the_first_rows_also_behind_them(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"what {n}", "completion": "fine"} for n in range(5)]
    rows.append({"text": "hello"})
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in (1, 0):  # from the beginning, and after a resume
        stream = Stream(section(str(tmp_path / "mixed.jsonl"), buffer_size=5), family("chatml"))
        with pytest.raises(InputError, match=r"mixed.jsonl:6: data.train: has no column `prompt`"):
            [stream.chunk(0, index) for index in range(number, 2)]


def test_samples_are_those_of_data_held_whole(tmp_path: Path) -> None:
    path = write(tmp_path, "one", 5)
    chunk, _ = Stream(section(path, buffer_size=9), family("chatml")).chunk(0, 0)
    (tmp_path / "data").mkdir()
    whole = prepare(DataSection(train=path), family("chatml"), folder=tmp_path / "data", seed=0)
    assert {name: column.tolist() for name, column in chunk.columns().items()} == {
        name: column.tolist() for name, column in whole.train.columns().items()
    }


def test_the_first_rows_are_audited(tmp_path: Path) -> None:
    paths = [write(tmp_path, name, STREAM_AUDITED) for name in ("one", "two")]
    (tmp_path / "data").mkdir()
    report = prepare(section(*paths), family("chatml"), folder=tmp_path / "data", seed=0).report
    assert report.streamed and [source.rows for source in report.train.sources] == [STREAM_AUDITED // 2] * 2


REFUSED = {
    "max_steps": ({"training": {"max_steps": -1}}, "needs training.max_steps"),
    "held out": ({"data": {"eval": {"split": 0.1}}}, "nothing can be held out"),
    "eval_strategy": ({"training": {"eval_strategy": "epoch"}}, "training.eval_strategy"),
    "save_strategy": ({"training": {"save_strategy": "epoch"}}, "training.save_strategy"),
    "classes": ({"model": {"task_type": "SEQ_CLS"}}, "model.labels"),
    "buffer_size alone": ({"data": {"streaming": False, "buffer_size": 9}}, "data.buffer_size is for data.streaming"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_stream_cannot_have_is_refused_by_name(name: str, tmp_path: Path) -> None:
    write(tmp_path, "one", 1)
    (tmp_path / "base").mkdir()
    changes, said = REFUSED[name]
    sections: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": "base"},
        "adapter": {"method": "lora"},
        "data": {"train": "one.jsonl", "streaming": True},
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 4},
    }
    for part, fields in changes.items():
        sections[part].update(fields)
    (tmp_path / "recipe.yaml").write_text(json.dumps(sections))
    with pytest.raises(InputError, match=said):
        load_recipe(tmp_path / "recipe.yaml")
