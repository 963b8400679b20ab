"""Files to rows: JSON Lines, JSON, CSV, Parquet and Arrow, plain or gzipped, each row with the place it came from.

Nobody vouches for these files: only regular files are opened, lines and decompressed sizes are bounded, nothing in them
is executed, and a file that is malformed anywhere is refused by line, never read in part.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from peftcli.errors import InputError, printable
from peftcli.files import open_regular, parse_json

MAX_LINE = 64 << 20  # bytes of one line
MAX_JSON = 4 << 30  # bytes of one .json file, which is read as a whole
MAX_INFLATION = 200  # text shrinks by a factor of 3 to 20; gzip reaches 1000 on blanks
FREE_INFLATION = 16 << 20  # bytes a gzip file may always unpack to
ROWS_PER_BATCH = 256

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One row of a data set.

    Args:
        place: `train.jsonl:7` or `train.parquet: row 7`, for messages.
        values: column name to value.
    """

    place: str
    values: dict[str, Any]


def read_file(path: Path) -> Iterator[Row]:
    """The rows of one file, by its suffix.

    Raises:
        InputError: no such file, no regular file, not a data file, or malformed.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    suffix = "".join(suffixes[-2:-1] if zipped else suffixes[-1:])
    reader = (_TEXT_READERS if zipped else READERS).get(suffix)
    if reader is None:
        raise _not_data(path, suffix, zipped)
    with open_regular(path) as file:
        yield from reader(path, _inflate(path, file) if zipped else file)


def is_data_file(path: Path) -> bool:
    """Whether `read_file` knows the suffix."""
    return (
        path.with_suffix("").suffix.lower() in _TEXT_READERS
        if path.suffix.lower() == ".gz"
        else (path.suffix.lower() in READERS)
    )


def _not_data(path: Path, suffix: str, zipped: bool) -> InputError:
    fix = "convert it to JSON Lines: one object a line"
    if suffix == ".py":
        return InputError("is a loading script (.py); data sets are never run as code", place=path, fix=fix)
    if suffix in {".safetensors", ".gguf", ".bin", ".pt", ".pth"}:
        return InputError(f"is a model file ({suffix}), not training data", place=path)
    allowed = " ".join(READERS) + "; text formats also with .gz"
    name = f"{suffix}.gz" if zipped else suffix
    return InputError(f"is no known kind of data file ({name or 'no suffix'})", place=path, allowed=allowed, fix=fix)


class _Inflated(io.RawIOBase):
    """A gzip file as a stream that refuses to grow without bound."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._stream = path, gzip.GzipFile(fileobj=file)
        self._left = max(FREE_INFLATION, MAX_INFLATION * os.fstat(file.fileno()).st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            chunk = self._stream.read1(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"is not a whole gzip file: {error}", place=self._path) from error
        self._left -= len(chunk)
        if self._left < 0:
            raise InputError(
                f"unpacks to more than {MAX_INFLATION} times its size", place=self._path, fix="unpack it yourself"
            )
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _inflate(path: Path, file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(_Inflated(path, file), buffer_size=1 << 20)


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Line number from 1 and line with its end; a byte order mark is taken off."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise InputError(f"is a line of more than {MAX_LINE:,} bytes", place=f"{path}:{number}")
        yield number, line.removeprefix(_BOM) if number == 1 else line


def _read_json_lines(path: Path, file: BinaryIO) -> Iterator[Row]:
    for number, line in _lines(path, file):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = parse_json(line.rstrip())
        except ValueError as error:
            problem = str(error).replace("line 1 column", "column")  # the line is in `place`
            raise InputError(problem, place=place, fix=_advice(number, line)) from error
        yield Row(place, _mapping(value, place))


def _advice(number: int, line: bytes) -> str:
    """What may have gone wrong with a line that is no JSON."""
    if line.startswith(b"\x1f\x8b"):
        return "the file is gzipped: give its name the suffix .gz"
    if number == 1 and line.strip() in (b"{", b"[", b"[{"):
        return "JSON Lines has one object a line; a JSON array is read from a .json file"
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return "save the file as UTF-8"
    if not line.endswith(b"\n") and line.rstrip()[-1:] != b"}":
        return "the file may be cut off: its last line has no end"
    return "JSON Lines has one object a line, and \\n and \\t inside strings"


def _read_json(path: Path, file: BinaryIO) -> Iterator[Row]:
    """An array of rows; many `.json` files are JSON Lines in fact, and are read as such."""
    raw = file.read(MAX_JSON + 1).removeprefix(_BOM)
    if len(raw) > MAX_JSON:
        raise InputError(f"is a .json of more than {MAX_JSON:,} bytes", place=path, fix="convert it to JSON Lines")
    if not raw[:4096].lstrip().startswith(b"["):
        yield from _read_json_lines(path, io.BytesIO(raw))
        return
    try:
        values = parse_json(raw)
    except ValueError as error:
        raise InputError(str(error), place=path) from error
    for number, value in enumerate(values, 1):
        place = f"{path}: row {number}"
        yield Row(place, _mapping(value, place))


def _mapping(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    kind = {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}.get(type(value), "a number")
    raise InputError(f"a row must be a JSON object, but this is {kind}", place=place)


def _read_csv(path: Path, file: BinaryIO, delimiter: str = ",") -> Iterator[Row]:
    """The first line names the columns. Quoting as RFC 4180."""

    def decoded() -> Iterator[str]:
        for number, line in _lines(path, file):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                problem, fix = f"not UTF-8 (byte {error.start})", "save the file as UTF-8"
                raise InputError(problem, place=f"{path}:{number}", fix=fix) from error

    csv.field_size_limit(MAX_LINE)
    table = csv.reader(decoded(), delimiter=delimiter, strict=True)
    names: list[str] = []
    start = 1
    while True:
        place = f"{path}:{start}"
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            problem = "a quote opened in this row is never closed" if "end of data" in str(error) else str(error)
            raise InputError(f"not valid CSV: {problem}", place=place) from error
        start = table.line_num + 1
        if not cells:
            continue
        if not names:
            names = _header(cells, place, delimiter)
        elif len(cells) != len(names):
            raise InputError(f"has {len(cells)} cells, but the header names {len(names)} columns", place=place)
        else:
            yield Row(place, dict(zip(names, cells, strict=True)))


def _header(names: list[str], place: str, delimiter: str) -> list[str]:
    other = next((mark for mark in ",;\t|" if mark != delimiter and mark in names[0]), None)
    if len(names) == 1 and other:
        raise InputError(
            f"the header has one column, {printable(names[0])!r}, which holds {other!r}",
            place=place,
            fix=".csv files are separated by commas, .tsv files by tabs",
        )
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"column {printable(min(twice))!r} is named twice", place=place)
    return names


def _read_tsv(path: Path, file: BinaryIO) -> Iterator[Row]:
    return _read_csv(path, file, delimiter="\t")


def _read_parquet(path: Path, file: BinaryIO) -> Iterator[Row]:
    import pyarrow.parquet

    return _rows_of_batches(path, lambda: pyarrow.parquet.ParquetFile(file).iter_batches(ROWS_PER_BATCH))


def _read_arrow(path: Path, file: BinaryIO) -> Iterator[Row]:
    """Arrow's file format (also Feather), or the stream format that `datasets` saves."""
    import pyarrow

    def record_batches() -> Iterator[Any]:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(file)
            return (reader.get_batch(index) for index in range(reader.num_record_batches))
        return iter(pyarrow.ipc.open_stream(file))

    return _rows_of_batches(path, record_batches)


def _rows_of_batches(path: Path, record_batches: Callable[[], Iterator[Any]]) -> Iterator[Row]:
    """Rows of Arrow record batches, a few at a time: `to_pylist` of a whole table can need ten times its size."""
    import pyarrow

    number = 0
    try:
        for record_batch in record_batches():
            for start in range(0, record_batch.num_rows, ROWS_PER_BATCH):
                for values in record_batch.slice(start, ROWS_PER_BATCH).to_pylist():
                    number += 1
                    yield Row(f"{path}: row {number}", values)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last: dates beyond Python's
        kind = path.suffix.lstrip(".").capitalize()
        place = f"{path}: behind row {number}" if number else path
        raise InputError(f"is no readable {kind} file: {printable(error)}", place=place) from error


_TEXT_READERS = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}
READERS: dict[str, Callable[[Path, BinaryIO], Iterator[Row]]] = {
    **_TEXT_READERS,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}
"""File suffix -> its reader."""
