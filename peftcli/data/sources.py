"""Where rows come from: a file, a folder of files, or a data set on the hub."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.data.readers import READERS, ROWS_PER_BATCH, Row, is_data_file, read_file
from peftcli.errors import InputError, printable

if TYPE_CHECKING:
    from peftcli.recipe.schema import DataSource

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test",)}
"""Split -> how names of its files begin."""
PART_SPLITS = {"train": ("train",), "eval": ("validation", "test")}
"""Part of the data -> the splits to take where a source names none, best first."""
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # beside saved data sets


STREAM_AUDITED = 1000
"""Rows of a stream that are looked at before training, over all its sources."""


def first_rows(sources: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
    """The sources of a stream, cut to the rows that are audited."""
    each = max(1, STREAM_AUDITED // len(sources))
    return tuple(source.model_copy(update={"max_samples": min(each, source.max_samples or each)}) for source in sources)


def read_source(source: DataSource, splits: tuple[str, ...], *, stream: bool = False) -> Iterator[Row]:
    """The rows of one source with its columns renamed to those of its format, at most `max_samples`.

    Args:
        source: from the recipe; its path is absolute, or the name of a data set on the hub.
        splits: the splits to take if the source names none, best first.
        stream: fetch a data set of the hub while it is read, rather than before.

    Raises:
        InputError: anything that cannot be read as it is.
    """
    for row in islice(_rows(source, splits, stream), source.max_samples):
        yield _renamed(row, source.columns) if source.columns else row


def source_files(source: DataSource, splits: tuple[str, ...]) -> list[Path]:
    """The files that hold the rows of one source, in their order; of a hub data set those in the library's cache.

    Raises:
        InputError: as `read_source`, as far as it can be told without reading rows.
    """
    files = _local_files(source, splits)
    if files is None:
        files = [Path(part["filename"]) for part in _hub_table(source, splits)[1].cache_files]
    return files


def _local_files(source: DataSource, splits: tuple[str, ...]) -> list[Path] | None:
    """None for a data set of the hub."""
    path = Path(source.path)
    if path.is_dir():
        return _files(path, source.split, splits)
    if is_data_file(path) and (source.split or source.name):
        name = "split" if source.split else "name"
        raise InputError(
            f"is one file, which has no {name} to choose",
            place=path,
            fix=f"leave `{name}` out; it is for folders and for data sets on the hub",
        )
    return [path] if path.is_absolute() or path.exists() or is_data_file(path) else None


def _rows(source: DataSource, splits: tuple[str, ...], stream: bool) -> Iterator[Row]:
    files = _local_files(source, splits)
    if files is None:
        yield from _hub_rows(source, splits, stream)
    for file in files or ():
        yield from read_file(file)


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    for column, theirs in columns.items():
        if theirs not in row.values:
            raise InputError(
                f"has no column {printable(theirs)!r}, which `columns` names for `{printable(column)}`",
                place=row.place,
                allowed=printable(", ".join(row.values)),
            )
    rest = {name: value for name, value in row.values.items() if name not in columns.values()}
    return Row(row.place, rest | {column: row.values[theirs] for column, theirs in columns.items()})


def _files(folder: Path, split: str | None, splits: tuple[str, ...]) -> list[Path]:
    """The data files of a folder that belong to the split; all of them if their names tell no splits."""
    entries = sorted(folder.rglob("*"))
    scripts = [entry for entry in entries if entry.suffix == ".py"]
    if scripts:
        raise InputError(
            "is a loading script (.py); data sets are never run as code",
            place=scripts[0],
            fix="convert the data set to JSON Lines or Parquet",
        )
    # A dangling or circular link is kept, so that reading it says what it is.
    files = [entry for entry in entries if is_data_file(entry) and not entry.is_dir() and entry.name not in _NOT_ROWS]
    if not files:
        raise InputError("is a folder without data files", place=folder, allowed=" ".join(READERS))
    of_split: dict[str, list[Path]] = {}
    for file in files:
        of_split.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    if split is None and len(of_split) == 1:
        return files
    found = next((name for name in ((split,) if split else splits) if name in of_split), None)
    if found is None:
        raise InputError(
            f"has no files of the split {printable(split or splits[0])!r}",
            place=folder,
            allowed=", ".join(sorted(name or "(files that name no split)" for name in of_split)),
        )
    return of_split[found]


def _split_of(file: Path) -> str:
    """`train` for `train.jsonl`, `train-00000-of-00002.parquet` and `train/part-0.parquet`; empty if no name tells."""
    for part in file.parts:
        word = part.lower().replace("_", "-").split(".")[0].split("-")[0]
        for split, beginnings in SPLITS.items():
            if word in beginnings:
                return split
    return ""


def _hub_table(source: DataSource, splits: tuple[str, ...], stream: bool = False) -> tuple[str, Any]:
    """The split that is taken of a hub data set, and the set itself."""
    return _open_on_hub(source.path, source.name, (source.split,) if source.split else splits, stream)


@cache
def _open_on_hub(path: str, name: str | None, splits: tuple[str, ...], stream: bool) -> tuple[str, Any]:
    """Once in a process: it is the same revision all along, and its servers are asked no more than they have to be."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        available = datasets.get_dataset_split_names(path, name)
        split = next((one for one in splits if one in available), splits[0])
        return split, datasets.load_dataset(path, name, split=split, streaming=stream)
    except Exception as error:  # the hub library raises whatever its network and file layers do
        why = f"{error}: {error.__cause__}" if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        raise InputError(
            f"is no file or folder here, and can't be loaded as a data set of the hub: {printable(why, 500)}",
            place=path,
            fix="check the path (it starts in the recipe's folder), the name, the configuration and the split",
        ) from error


def _hub_rows(source: DataSource, splits: tuple[str, ...], stream: bool) -> Iterator[Row]:
    """Rows of a hub data set, taken as Arrow so that images and audio are never decoded."""
    split, table = _hub_table(source, splits, stream)
    number, batches = 0, iter(table.with_format("arrow").iter(ROWS_PER_BATCH))
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # of a stream, the network's
            raise InputError(f"can't be read on: {printable(error)}", place=f"{source.path}[{split}]") from error
        if batch is None:
            return
        for values in batch.to_pylist():
            number += 1
            yield Row(f"{source.path}[{split}]: row {number}", values)
