"""Tokenised data kept between runs: what the name depends on, whole entries, two at once, damage, room."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from data.families import CHATML, family
from peftcli.data import cache as caching
from peftcli.data.cache import Cache, prepare_cached
from peftcli.data.cache_key import DataKey
from peftcli.data.prepare import WRITTEN
from peftcli.recipe.schema import DataSection

ARGUMENTS: dict[str, Any] = {"seed": 0, "task": "CAUSAL_LM", "labels": None, "vocab_size": None}
TODAY = date(2030, 1, 31)


def rows(count: int = 8, answer: str = "fine") -> str:
    return "".join(json.dumps({"prompt": f"what {n}", "completion": answer, "k": "hello"}) + "\n" for n in range(count))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data and a cache of its own."""
    (tmp_path / "train.jsonl").write_text(rows())
    (tmp_path / "eval.jsonl").write_text(rows(2, "thanks"))
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    return tmp_path


def data(place: Path, **changes: Any) -> DataSection:
    return DataSection.model_validate(
        {"train": str(place / "train.jsonl"), "eval": str(place / "eval.jsonl"), **changes}
    )


def name(place: Path, tokenizer: Any = None, arguments: dict[str, Any] | None = None, **changes: Any) -> str:
    key = DataKey(
        data(place, **changes), tokenizer or family("chatml"), today=TODAY, **{**ARGUMENTS, **(arguments or {})}
    )
    assert key.useless() is None
    return key.name()


def with_template(template: str) -> Any:
    tokenizer = copy.deepcopy(family("chatml"))
    tokenizer.chat_template = template
    return tokenizer


def with_token() -> Any:
    tokenizer = copy.deepcopy(family("chatml"))
    tokenizer.add_tokens([AddedToken("<new>", special=True)])
    return tokenizer


def source(place: Path, **fields: Any) -> dict[str, Any]:
    return {"train": [{"path": str(place / "train.jsonl"), **fields}]}


SETTINGS = {
    "format": lambda place: {"format": "prompt_completion"},
    "max_length": lambda place: {"max_length": 512},
    "overflow": lambda place: {"overflow": "drop"},
    "loss_on": lambda place: {"loss_on": "all"},
    "apply_chat_template": lambda place: {"apply_chat_template": False},
    "no evaluation": lambda place: {"eval": None},
    "held out": lambda place: {"eval": {"split": 0.25}},
    "weight": lambda place: source(place, weight=2.0),
    "columns": lambda place: source(place, columns={"prompt": "k"}),
    "max_samples": lambda place: source(place, max_samples=4),
    "task": lambda place: source(place, task=1),
    "format of a source": lambda place: source(place, format="prompt_completion"),
}


@pytest.mark.parametrize("change", SETTINGS)
def test_the_name_changes_with_every_setting(place: Path, change: str) -> None:
    assert name(place, **SETTINGS[change](place)) != name(place)


ARGUMENT_CHANGES: list[dict[str, Any]] = [
    {"seed": 1},
    {"task": "preference"},
    {"labels": ["a", "b"]},
    {"vocab_size": 99},
]


@pytest.mark.parametrize("change", ARGUMENT_CHANGES, ids=lambda change: next(iter(change)))
def test_the_name_changes_with_every_argument(place: Path, change: dict[str, Any]) -> None:
    assert name(place, arguments=change) != name(place)


def test_the_name_changes_with_files_tokenizer_and_template_and_with_nothing_else(place: Path) -> None:
    found = [
        name(place),
        name(place, with_token()),
        name(place, with_template(CHATML + " ")),
        name(place, family("qwen3")),
    ]
    for part in ("train", "eval"):
        file = place / f"{part}.jsonl"
        file.write_text(file.read_text().replace("what 0", "what 9"))  # as many bytes
        found.append(name(place))
    assert len(set(found)) == len(found)
    os.utime(place / "train.jsonl", (0, 0))
    assert name(place) == found[-1]
    assert name(place, packing="bfd") == found[-1]  # what the loop does with the samples


def test_a_folder_is_known_by_all_its_files(place: Path) -> None:
    (place / "folder").mkdir()
    (place / "folder/train-0.jsonl").write_text(rows())
    before = name(place, train=str(place / "folder"))
    (place / "folder/train-1.jsonl").write_text(rows(1))
    assert name(place, train=str(place / "folder")) != before


def test_our_own_code_is_part_of_the_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = name(place)
    monkeypatch.setattr("peftcli.data.cache_key._digest_of_code", lambda: "another")
    assert name(place) != before


@pytest.mark.parametrize(
    "call", ['strftime_now("%d %b %Y")', "strftime_now('%Y-%m-%d') if strftime_now is defined else ''"]
)
def test_a_template_that_writes_the_date_gives_a_name_for_each_day(place: Path, call: str) -> None:
    tokenizer = with_template("{{ " + call + " }}" + CHATML)
    names = {DataKey(data(place), tokenizer, today=date(2030, 1, day), **ARGUMENTS).name() for day in (1, 2)}
    assert DataKey(data(place), tokenizer, **ARGUMENTS).useless() is None and len(names) == 2
    fixed = {DataKey(data(place), family("chatml"), today=date(2030, 1, day), **ARGUMENTS).name() for day in (1, 2)}
    assert len(fixed) == 1


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ('{{ strftime_now("%H:%M") }}', "time of the day"),
        ('{{ strftime_now("%c") }}', "time of the day"),
        ("{% set form = '%d' %}{{ strftime_now(form) }}", "time of the day"),
        ("{{ [1] | random }}", "by chance"),
    ],
)
def test_a_template_that_writes_what_changes_is_said_and_nothing_is_kept(place: Path, template: str, why: str) -> None:
    found = cached(place, "run", tokenizer=with_template(template + CHATML))
    assert found.cache.startswith("off: ") and why in found.cache and not (place / "cache").exists()


def cached(place: Path, folder: str, tokenizer: Any = None, **changes: Any) -> Any:
    (place / folder).mkdir()
    key = DataKey(data(place, **changes), tokenizer or family("chatml"), **ARGUMENTS)
    return prepare_cached(key, folder=place / folder)


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in WRITTEN if (folder / name).exists()}


def entries(place: Path) -> list[Path]:
    return sorted((place / "cache/data").iterdir())


def test_data_from_the_cache_are_the_same_bytes(place: Path) -> None:
    first, again = cached(place, "first"), cached(place, "again")
    (entry,) = entries(place)
    assert first.cache == f"kept in {entry}" and again.cache == f"data from cache {entry}"
    assert content(place / "first") == content(place / "again") and set(content(place / "first")) == set(WRITTEN)
    assert again.report == first.report
    for one, other in ((first.train, again.train), (first.eval, again.eval)):
        assert {name: column.tolist() for name, column in one.columns().items()} == {
            name: column.tolist() for name, column in other.columns().items()
        }
    assert entry.parent.stat().st_mode & 0o077 == 0  # nobody else reads the user's data
    off = cached(place, "off", cache=False)
    assert off.cache == "off: data.cache is false" and content(place / "off") == content(place / "first")


@pytest.mark.parametrize("file", [*WRITTEN, "entry.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_entry_is_said_and_made_anew(place: Path, file: str, damage: str) -> None:
    cached(place, "first")
    (entry,) = entries(place)
    raw = (entry / file).read_bytes()
    if damage == "gone":
        (entry / file).unlink()
    else:
        (entry / file).write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:] if damage == "changed" else raw[:-9])
    again = cached(place, "again")
    assert again.cache.startswith(f"kept in {entry}, in the place of an entry that was damaged: ")
    assert content(place / "again") == content(place / "first") == content(entry)
    assert cached(place, "third").cache == f"data from cache {entry}"


def test_two_processes_at_once_leave_one_entry_and_the_same_data(place: Path) -> None:
    program = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from data.families import family
from peftcli.data.cache import prepare_cached
from peftcli.data.cache_key import DataKey
from peftcli.recipe.schema import DataSection
place, name = Path(sys.argv[2]), sys.argv[3]
key = DataKey(DataSection(train=str(place / "train.jsonl"), eval=str(place / "eval.jsonl")), family("chatml"),
              seed=0, task="CAUSAL_LM", labels=None, vocab_size=None)
(place / name).mkdir()
input()
print(prepare_cached(key, folder=place / name).cache)
"""
    tests = Path(__file__).parents[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, tests, place, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    with ThreadPoolExecutor(2) as pool:  # both are told to go once both are there
        said = list(pool.map(lambda process: process.communicate("\n", timeout=120)[0], processes))
    (entry,) = entries(place)
    assert all(process.returncode == 0 for process in processes)
    assert all(str(entry) in text for text in said)
    assert content(place / "one") == content(place / "two") == content(entry)


def test_the_slower_of_two_drops_its_work(place: Path) -> None:
    """It had not found the entry when it looked, and finds it when it is done."""
    cached(place, "first")
    (entry,) = entries(place)
    before = {path: path.stat().st_ino for path in entry.iterdir()}
    assert Cache(place / "cache/data").keep(entry.name, place / "first") == f"kept in {entry}"
    assert entries(place) == [entry] and {path: path.stat().st_ino for path in entry.iterdir()} == before


def test_the_least_recently_used_entries_make_room(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [cached(place, f"run{length}", max_length=length).cache for length in (100, 200, 300)]
    names = [Path(text.removeprefix("kept in ")) for text in found]
    for age, entry in zip((1, 3, 2), names, strict=True):
        os.utime(entry, (1e9 - age, 1e9 - age))
    size = sum(path.stat().st_size for entry in names for path in entry.iterdir())
    monkeypatch.setattr(caching, "MAX_BYTES", size)
    cached(place, "used", max_length=200)  # now the oldest is that of 300
    new = Path(cached(place, "new", max_length=400).cache.removeprefix("kept in "))
    assert entries(place) == sorted([names[0], names[1], new])
    monkeypatch.setattr(caching, "MAX_BYTES", 10)
    assert cached(place, "large", max_length=500).cache.startswith("not kept: ")


def test_a_cache_that_cannot_be_written_fails_no_run(place: Path) -> None:
    (place / "cache").write_text("a file")
    assert cached(place, "run").cache.startswith("not kept: ") and set(content(place / "run")) == set(WRITTEN)


def test_a_file_that_changes_while_it_is_read_is_not_kept(place: Path) -> None:
    (place / "run").mkdir()
    key = DataKey(data(place), family("chatml"), **ARGUMENTS)

    def meddle(path: str, done: int) -> None:
        (place / "train.jsonl").write_text(rows(9))

    assert prepare_cached(key, folder=place / "run", progress=meddle).cache.startswith("not kept: the files changed")
    assert not (place / "cache").exists()
