"""Bases are found where training took them from: packages, .gguf files, folders. Nothing is fetched, converted or imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from peftcli.adapters.base_places import conversion_folder, find_base


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "cache"


def package(folder: Path, file: str, content: bytes) -> Path:
    """A package that must not be imported."""
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "config.json").write_text("{}")
    (folder / file).write_bytes(content)
    return folder


def test_a_package_with_a_models_folder(tmp_path: Path) -> None:
    folder = package(tmp_path / "carries_a_model", "model.safetensors", b"")
    for name in ("package:carries_a_model", "package:carries-a-model"):
        assert find_base(name, None, beside=tmp_path) == folder
    assert "carries_a_model" not in sys.modules


@pytest.mark.parametrize("name", ["no_such_package", "json", "os.path", "__main__", "", "..", "a" * 5000, "\0"])
def test_a_package_without_a_model(tmp_path: Path, name: str) -> None:
    assert find_base(f"package:{name}", None, beside=tmp_path) is None


def test_a_gguf_file_is_found_once_it_is_converted(tmp_path: Path, cache: Path) -> None:
    file = package(tmp_path / "carries_a_gguf", "a b.gguf", b"GGUF1") / "a b.gguf"
    names = ("package:carries_a_gguf", str(file), "carries_a_gguf/a b.gguf")
    assert [find_base(name, None, beside=tmp_path) for name in names] == [None] * 3
    assert not cache.exists()  # it was not even hashed
    conversion_folder(file).mkdir(parents=True)
    assert [find_base(name, None, beside=tmp_path) for name in names] == [conversion_folder(file)] * 3
    file.write_bytes(b"GGUF2")  # another file of the same name and size
    assert find_base(names[0], None, beside=tmp_path) is None


def test_what_is_no_gguf_file_is_no_base(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04")
    (cache / "bases" / "x-0-1").mkdir(parents=True)
    assert find_base("x.gguf", None, beside=tmp_path) is None


@pytest.mark.parametrize("kept", ["0" * 64, "no hash"])
def test_a_file_is_hashed_once(tmp_path: Path, cache: Path, kept: str) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    named = conversion_folder(tmp_path / "x.gguf").name
    (memory,) = (cache / "hashes").iterdir()
    memory.write_text(kept)
    assert ("x-0000000000000000-1" if kept[0] == "0" else named) == conversion_folder(tmp_path / "x.gguf").name
