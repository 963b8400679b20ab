"""Every kind of file read, and every kind of broken file refused by file, line and reason."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from peftcli.data.readers import is_data_file, read_file
from peftcli.errors import InputError

ROWS = [{"prompt": "héllo", "completion": 'a "b", c'}, {"prompt": "x\ny", "completion": ""}]
LINES = '{"prompt": "héllo", "completion": "a \\"b\\", c"}\n\n{"prompt": "x\\ny", "completion": ""}\n'
ARRAY = f"[{LINES.replace('}', '},', 1)}]"
TABLE = 'prompt,completion\nhéllo,"a ""b"", c"\n\n"x\ny",\n'

TEXTS = {
    "rows.jsonl": LINES,
    "rows.ndjson": LINES,
    "bom.jsonl": "\ufeff" + LINES,
    "crlf.jsonl": LINES.replace("\n", "\r\n"),
    "no_last_end.jsonl": LINES.rstrip(),
    "rows.json": ARRAY,
    "bom.json": "\ufeff" + ARRAY,
    "lines.json": LINES,
    "rows.csv": TABLE,
    "bom.csv": "\ufeff" + TABLE,
    "rows.tsv": TABLE.replace("prompt,", "prompt\t").replace("llo,", "llo\t").replace('y",', 'y"\t'),
    "ROWS.JSONL": LINES,
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("zipped", [False, True])
def test_text_files(tmp_path, name, zipped):
    raw = TEXTS[name].encode()
    path = tmp_path / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    assert is_data_file(path)
    assert [row.values for row in read_file(path)] == ROWS


def test_a_place_is_the_line_a_row_begins_in(tmp_path):
    for name, text in (("rows.jsonl", LINES), ("rows.csv", TABLE)):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        begins = 1 if name == "rows.jsonl" else 2
        assert [row.place for row in read_file(path)] == [f"{path}:{begins}", f"{path}:{begins + 2}"]


def test_columnar_files(tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    pyarrow.feather.write_feather(table, str(tmp_path / "rows.feather"))
    with pyarrow.ipc.new_stream(tmp_path / "rows.arrow", table.schema) as stream:
        stream.write_table(table)
    for name in ("rows.parquet", "rows.feather", "rows.arrow"):
        rows = list(read_file(tmp_path / name))
        assert [row.values for row in rows] == ROWS
        assert rows[1].place == f"{tmp_path / name}: row 2"


GOOD = b'{"a": 1}\n'
BROKEN = [
    ("list.jsonl", GOOD * 6 + b"[1]\n", ":7: a row must be a JSON object, but this is an array"),
    ("number.jsonl", GOOD + b"3\n", ":2: a row must be a JSON object, but this is a number"),
    ("null.jsonl", b"null\n", ":1: a row must be a JSON object, but this is null"),
    ("cut.jsonl", GOOD * 2 + b'{"a": "wor', r":3: not valid JSON: .* column 7 [\s\S]*cut off"),
    ("nan.jsonl", GOOD + b'{"a": NaN}\n', ":2: not valid JSON: `a` holds a number that is not finite"),
    ("huge.jsonl", b'{"a": 1e999}\n', ":1: not valid JSON: `a` holds a number that is not finite"),
    ("twice.jsonl", b'{"a": 1, "a": 2}\n', ":1: not valid JSON: duplicate key 'a'"),
    ("deep.jsonl", b'{"a": ' + b"[" * 100_000 + b"\n", ":1: nested too deeply"),
    ("latin.jsonl", GOOD * 3 + b'{"a": "caf\xe9"}\n', r":4: not UTF-8 \(byte 10\)[\s\S]*save the file as UTF-8"),
    ("zipped.jsonl", gzip.compress(GOOD, mtime=0), r":1: not UTF-8[\s\S]*suffix \.gz"),
    ("pretty.jsonl", b'[\n {"a": 1}\n]\n', r":1: not valid JSON[\s\S]*a JSON array is read from"),
    ("open.jsonl", GOOD + b'{"a": 1\n', r":2: not valid JSON: Expecting ',' delimiter: column 8 "),
    ("tab.jsonl", b'{"a": "x\ty"}\n', r":1: not valid JSON[\s\S]*\\n and \\t inside"),
    ("one.csv", b"a;b\n1;2\n", r":1: the header has one column, 'a;b', which holds ';'\n.*commas"),
    ("object.json", b'{"data":\n [1]}\n', ":1: not valid JSON"),
    ("cut.json", b'[{"a": 1}, {"a"', r"cut\.json: not valid JSON"),
    ("inner.json", b'[{"a": 1}, [2]]', "row 2: a row must be a JSON object, but this is an array"),
    ("ragged.csv", b"a,b\n1,2\n1,2,3\n", ":3: has 3 cells, but the header names 2 columns"),
    ("unclosed.csv", b'a,b\n1,2\n"3,4\n5,6\n', ":3: not valid CSV: a quote opened in this row is never closed"),
    ("quotes.csv", b'a,b\n"1"x,2\n', ":2: not valid CSV"),
    ("header.csv", b"a,b,a\n1,2,3\n", ":1: column 'a' is named twice"),
    ("latin.csv", b"a\nb\ncaf\xe9\n", r":3: not UTF-8"),
    ("fake.parquet", b"PAR1" + b"\0" * 50, r"fake\.parquet: is no readable Parquet file"),
    ("cut.arrow", b"ARROW1\0\0 nothing", r"cut\.arrow: is no readable Arrow file"),
    ("empty.parquet", b"", r"empty\.parquet: is no readable Parquet file"),
    ("cut.jsonl.gz", gzip.compress(GOOD * 1000, mtime=0)[:-20], r"cut\.jsonl\.gz: is not a whole gzip file"),
    ("plain.jsonl.gz", GOOD, r"plain\.jsonl\.gz: is not a whole gzip file"),
    (
        "bomb.jsonl.gz",
        gzip.compress(b" " * (64 << 20), mtime=0),
        r"bomb\.jsonl\.gz: unpacks to more than 200 times its size",
    ),
    ("rows.parquet.gz", GOOD, r"is no known kind of data file \(\.parquet\.gz\)"),
    ("load.py", b"raise SystemExit\n", r"is a loading script \(\.py\)"),
    ("model.safetensors", b"", r"is a model file \(\.safetensors\)"),
    ("rows.xlsx", b"", r"is no known kind of data file \(\.xlsx\)[\s\S]*\.jsonl"),
    ("rows", b"", r"is no known kind of data file \(no suffix\)"),
]


@pytest.mark.parametrize(("name", "raw", "message"), BROKEN)
def test_broken_files(tmp_path, name, raw, message):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(InputError, match=message):
        list(read_file(path))


def test_dates_that_python_does_not_have_are_refused_by_file(tmp_path):
    rows = {"text": ["a", "b"], "day": pyarrow.array([1, 1 << 30], pyarrow.date32())}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "dates.parquet")
    with pytest.raises(InputError, match=r"dates\.parquet: is no readable Parquet file: days=1073741824"):
        list(read_file(tmp_path / "dates.parquet"))


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("pipe", "loop", "zero", "folder", "missing"):
        with pytest.raises(InputError, match=rf"{name}\.jsonl"):
            list(read_file(tmp_path / f"{name}.jsonl"))


def test_a_link_to_a_file_is_followed(tmp_path):
    (tmp_path / "real.jsonl").write_text(LINES, encoding="utf-8")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    assert len(list(read_file(tmp_path / "link.jsonl"))) == 2


def test_a_line_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("peftcli.data.readers.MAX_LINE", 100)
    path = Path(tmp_path / "long.jsonl")
    path.write_bytes(GOOD + b"x" * 1000)
    with pytest.raises(InputError, match=r":2: is a line of more than 100 bytes"):
        list(read_file(path))
