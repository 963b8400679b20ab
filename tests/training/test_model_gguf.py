"""GGUF files: converted once, exactly, whole or not at all; found in a package without importing it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from gguf_files import tokens, write

from peftcli.adapters.base_places import package_model
from peftcli.errors import InputError, RunError
from peftcli.recipe.schema import ModelSection
from peftcli.training import gguf as conversion
from peftcli.training.gguf import converted
from peftcli.training.locate import resolve_base
from peftcli.training.model import load_base, load_tokenizer

from .tiny import VOCABULARY, tiny_llama

TOKENS = tokens(VOCABULARY)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny llama.gguf", tiny_llama())


def test_a_file_becomes_the_same_model(file: Path) -> None:
    section = ModelSection(name_or_path=str(file))
    model, ids = load_base(section, device="cpu"), torch.arange(3, 11).view(1, 8)
    assert model.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tiny_llama().eval()(ids).logits)
    assert model.config.name_or_path == str(file)
    assert model.generation_config.eos_token_id == 2


def test_its_tokenizer_comes_along(file: Path) -> None:
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(file)))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "AB"}], tokenize=False)
    assert text == "<|im_start|>user: AB<|im_end|>"
    ids = tokenizer("<|im_start|>ABBA<|im_end|>", add_special_tokens=False).input_ids
    assert [TOKENS[index] for index in ids] == ["<|im_start|>", "AB", "B", "A", "<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"  # its pad was its eos


def test_it_is_converted_once(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = converted(file)
    assert [path.name for path in cache.iterdir()] == [first.name] and first.name.startswith("tiny_llama-")
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~conversion._umask() for path in first.iterdir())
    monkeypatch.setattr(conversion, "_convert", None)
    assert converted(file) == resolve_base(str(file)) == first


def test_another_file_is_another_model(file: Path, tmp_path: Path) -> None:
    other = write(tmp_path / file.name, tiny_llama(seed=1))
    assert converted(other) != converted(file)


def test_of_two_processes_the_first_wins(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = conversion._convert

    def overtaken(source: Path, folder: Path) -> None:
        convert(source, folder)
        rival = cache / folder.name.removeprefix(".tmp-").rpartition("-")[0]
        rival.mkdir()
        (rival / "theirs").touch()

    monkeypatch.setattr(conversion, "_convert", overtaken)
    folder = converted(file)
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_what_fails_leaves_nothing_behind(file: Path, cache: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"broken.gguf: can't be read as a GGUF model"):
        converted(broken)
    assert list(cache.iterdir()) == []


def test_a_cache_that_can_not_be_written(file: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.touch()
    with pytest.raises(RunError, match="can't be written"):
        converted(file)


def test_no_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="is no GGUF file"):
        resolve_base(str(tmp_path / "x.gguf"))


# -- packages ---------------------------------------------------------------------------------------------------------


def package(folder: Path, *files: str) -> None:
    """A package that must not be imported."""
    (folder / "a_model" / "data").mkdir(parents=True)
    (folder / "a_model" / "__init__.py").write_text("raise AssertionError('imported')")
    for file in files:
        (folder / "a_model" / "data" / file).touch()


def test_a_package_is_looked_into_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "one.gguf", "read.me")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_model("a_model") == package_model("a-model") == tmp_path / "a_model" / "data" / "one.gguf"
    assert "a_model" not in sys.modules


def test_a_package_may_carry_a_models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "config.json", "model.safetensors")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_model("a_model") == resolve_base("package:a_model") == tmp_path / "a_model" / "data"


def test_a_package_with_several_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "one.gguf", "two.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"(?s)holds 2 models.*one.gguf, .*two.gguf"):
        package_model("a_model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_model", "(?s)no installed Python package 'no_such_model'.*pip install"),
        ("json", "json holds 0 models"),
        ("os", "os holds 0 models"),
        ("a_model.data", "no installed Python package"),
        ("../a_model", "no installed Python package"),
        ("", "no installed Python package"),
    ],
)
def test_no_package_with_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=message):
        resolve_base(f"package:{name}")
