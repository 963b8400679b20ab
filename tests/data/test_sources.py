"""Folders, splits, renamed columns, and what is not on this machine."""

from __future__ import annotations

import datasets
import pytest

from peftcli.data.sources import read_source
from peftcli.errors import InputError
from peftcli.recipe.schema import DataSource

TRAIN, EVAL = ("train",), ("validation", "test")


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"text": "{name}"}}\n{{"text": "{name} again"}}\n', encoding="utf-8")


def texts(splits=TRAIN, **source):
    return [row.values["text"] for row in read_source(DataSource(**source), splits)]


def test_a_folder_is_its_data_files_in_order(tmp_path):
    write(tmp_path, "b.jsonl", "a.jsonl", "more/c.jsonl", "README.md", "dataset_info.json", ".gitattributes")
    assert texts(path=str(tmp_path))[::2] == ["a.jsonl", "b.jsonl", "more/c.jsonl"]


def test_a_folder_of_splits_gives_the_one_asked_for(tmp_path):
    write(tmp_path, "train-00000-of-00001.jsonl", "validation/part.jsonl", "test.jsonl")
    assert texts(path=str(tmp_path))[0] == "train-00000-of-00001.jsonl"
    assert texts(EVAL, path=str(tmp_path))[0] == "validation/part.jsonl"
    assert texts(path=str(tmp_path), split="test")[0] == "test.jsonl"
    with pytest.raises(InputError, match=r"no files of the split 'dev'[\s\S]*test, train, validation"):
        texts(path=str(tmp_path), split="dev")


def test_max_samples_reads_no_further(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "1"}\n{"text": "2"}\nbroken\n', encoding="utf-8")
    assert texts(path=str(path), max_samples=2) == ["1", "2"]


def test_columns_are_renamed(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("q,a,id\nhow,so,7\n", encoding="utf-8")
    source = DataSource(path=str(path), columns={"prompt": "q", "completion": "a"})
    assert [row.values for row in read_source(source, TRAIN)] == [{"prompt": "how", "completion": "so", "id": "7"}]
    with pytest.raises(InputError, match=r"rows\.csv:2: has no column 'answer'[\s\S]*q, a, id"):
        list(read_source(DataSource(path=str(path), columns={"completion": "answer"}), TRAIN))


def test_columns_can_be_swapped(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\nhow,so\n", encoding="utf-8")
    source = DataSource(path=str(path), columns={"prompt": "completion", "completion": "prompt"})
    assert [row.values for row in read_source(source, TRAIN)] == [{"prompt": "so", "completion": "how"}]


def test_a_saved_data_set_is_read(tmp_path):
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "saved")
    assert texts(path=str(tmp_path / "saved")) == ["one", "two"]


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="is a folder without data files"):
        texts(path=str(tmp_path))
    (tmp_path / "train.jsonl").symlink_to(tmp_path / "train.jsonl")
    with pytest.raises(InputError, match=r"train\.jsonl: cannot be read"):
        texts(path=str(tmp_path))
    (tmp_path / "load.py").write_text("raise SystemExit", encoding="utf-8")
    with pytest.raises(InputError, match=r"load\.py: is a loading script"):
        texts(path=str(tmp_path))


def test_what_is_neither_here_nor_on_the_hub():
    with pytest.raises(InputError, match=r"missing\.jsonl: cannot be read"):
        texts(path="missing.jsonl")
    with pytest.raises(InputError, match="nobody/nothing: is no file or folder here, and can't be loaded"):
        texts(path="nobody/nothing")


@pytest.mark.parametrize("option", ["split", "name"])
def test_a_file_has_no_splits_to_choose_from(tmp_path, option):
    write(tmp_path, "train.jsonl")
    with pytest.raises(InputError, match=f"is one file, which has no {option} to choose"):
        texts(path=str(tmp_path / "train.jsonl"), **{option: "test"})
