"""The safetensors header is read strictly: whatever bytes a file has, the answer is a header or one `InputError`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from adapter_files import lora_tensors, safetensors, with_header
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcli.adapters.header import BITS, MAX_HEADER_BYTES, read_header
from peftcli.errors import InputError

GOOD = safetensors(lora_tensors(), metadata={"format": "pt"})
HEADER_END = 8 + int.from_bytes(GOOD[:8], "little")


def write(folder: Path, content: bytes) -> Path:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(content)
    return path


def test_a_good_file(tmp_path: Path) -> None:
    file = read_header(write(tmp_path, GOOD))
    assert file.metadata == {"format": "pt"}
    assert file.size == len(GOOD)
    assert {name: info.shape for name, info in file.tensors.items()} == {
        n: s for n, (_, s, _) in lora_tensors().items()
    }
    first = next(iter(file.tensors.values()))
    assert (first.start, first.nbytes, first.numel) == (HEADER_END, 256, 64)


def test_agrees_with_the_safetensors_package(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    save_file = pytest.importorskip("safetensors.numpy").save_file
    arrays = {"a": numpy.arange(6.0).reshape(2, 3), "b": numpy.zeros((0, 4), "f4"), "c": numpy.array(3, "i8")}
    save_file(arrays, tmp_path / "x.safetensors")
    file = read_header(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    for name, array in arrays.items():
        info = file.tensors[name]
        assert info.shape == array.shape
        assert content[info.start : info.stop] == array.tobytes()


def one(name: str = "t", **entry: object) -> bytes:
    """A file of one F32 [2] tensor, its entry changed."""
    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry
    return with_header(json.dumps({name: whole}).encode(), bytes(8))


REFUSED = {
    "empty": (b"", "empty"),
    "shorter than the length": (b"1234567", "7 bytes"),
    "no header": (bytes(8), "does not start with"),
    "length above the limit": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "above the limit"),
    "length 2^63": ((1 << 63).to_bytes(8, "little") + b"{}", "above the limit"),
    "length above the file": ((1000).to_bytes(8, "little") + b"{}", "cut short"),
    "leading blank": (with_header(b" {}"), "does not start with"),
    "an array": (with_header(b"[]"), "does not start with"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "zip": (b"PK\x03\x04" + bytes(30), "pickle"),
    "gguf": (b"GGUF" + bytes(30), "GGUF"),
    "not JSON": (with_header(b"{]"), "not valid JSON"),
    "not UTF-8": (with_header(b'{"\xff":1}'), "not UTF-8"),
    "deep": (with_header(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "duplicate key": (with_header(b'{"a":1,"a":1}'), "duplicate key"),
    "NaN": (with_header(b'{"a":NaN}'), "not finite"),
    "endless number": (with_header(b'{"a":' + b"9" * 5000 + b"}"), "not finite"),
    "entry is a list": (with_header(b'{"a":[]}'), "no object of"),
    "entry has more": (one(more=1), "no object of"),
    "unknown dtype": (one(dtype="F128"), "F128"),
    "dtype is a number": (one(dtype=3), "dtype 3"),
    "shape is text": (one(shape="2"), "shape"),
    "shape is negative": (one(shape=[-2]), "shape"),
    "shape is a bool": (one(shape=[True, 2]), "shape"),
    "shape is a fraction": (one(shape=[2.0]), "shape"),
    "shape overflows": (one(shape=[1 << 40, 1 << 40]), "bytes"),
    "too many dimensions": (one(shape=[1] * 65), "shape"),
    "dtype narrower than its bytes": (one(dtype="F16"), "4 bytes, but its offsets span 8"),
    "half a byte": (one(dtype="F4", shape=[15]), "bytes"),
    "offsets are text": (one(data_offsets=["0", "8"]), "data_offsets"),
    "offsets fall": (one(data_offsets=[8, 0]), "data_offsets"),
    "three offsets": (one(data_offsets=[0, 8, 8]), "data_offsets"),
    "gap before": (one(shape=[1], data_offsets=[4, 8]), "gap"),
    "bytes after": (one(shape=[1], data_offsets=[0, 4]), "4 bytes after the last tensor"),
    "beyond the file": (one(shape=[4], data_offsets=[0, 16]), "cut short"),
    "metadata is a list": (with_header(b'{"__metadata__":[]}'), "__metadata__"),
    "metadata holds a number": (with_header(b'{"__metadata__":{"a":1}}'), "__metadata__"),
    "endless name": (one("n" * 1_000_000), "name of more than"),
}


@pytest.mark.parametrize(("content", "says"), REFUSED.values(), ids=REFUSED)
def test_refused(content: bytes, says: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 4000


def test_overlap(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    with pytest.raises(InputError, match="overlaps"):
        read_header(write(tmp_path, with_header(json.dumps({"a": entry, "b": entry}).encode(), bytes(8))))


def test_every_problem_is_listed(tmp_path: Path) -> None:
    entry = {"dtype": "F128", "shape": [2], "data_offsets": [0, 8]}
    content = with_header(json.dumps({f"tensor{i}": entry for i in range(3)}).encode(), bytes(8))
    with pytest.raises(InputError) as caught:
        read_header(write(tmp_path, content))
    assert all(f"tensor{i}" in str(caught.value) for i in range(3))


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype(dtype: str, tmp_path: Path) -> None:
    content = bytes(BITS[dtype])
    assert read_header(write(tmp_path, safetensors({"t": (dtype, (8,), content)}))).tensors["t"].nbytes == len(content)


def test_an_unpadded_header_is_fine(tmp_path: Path) -> None:
    for blanks in range(8):
        text = json.dumps({"t": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}).encode() + b" " * blanks
        assert read_header(write(tmp_path, with_header(text, b"x"))).tensors["t"].shape == ()


@pytest.mark.parametrize("size", range(0, len(GOOD), 7))
def test_cut_anywhere(size: int, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read_header(write(tmp_path, GOOD[:size]))


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name, says in {"pipe": "a pipe", "dangling": "nowhere", "loop": "cannot be read", ".": "a folder"}.items():
        with pytest.raises(InputError, match=says):
            read_header(tmp_path / name)
    with pytest.raises(InputError, match="NUL"):
        read_header(Path("a\0b"))


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    (tmp_path / "link").symlink_to("adapter_model.safetensors")
    assert len(read_header(tmp_path / "link").tensors) == 8


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, HEADER_END + 8), byte=st.integers(0, 255))
def test_any_changed_byte(place: int, byte: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = bytearray(GOOD)
    content[place] = byte
    path = write(tmp_path_factory.getbasetemp(), bytes(content))
    try:
        file = read_header(path)
    except InputError:
        return
    assert sum(tensor.nbytes for tensor in file.tensors.values()) == len(GOOD) - HEADER_END


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F128"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(st.text(max_size=8), entries | json_values, max_size=4), data=st.binary(max_size=40))
def test_any_header(header: dict[str, object], data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.getbasetemp(), with_header(json.dumps(header).encode(), data))
    try:
        file = read_header(path)
    except InputError:
        return
    assert sum(tensor.nbytes for tensor in file.tensors.values()) == len(data)


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=80))
def test_any_bytes(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.getbasetemp(), content)
    try:
        read_header(path)
    except InputError as error:
        assert str(path) in str(error)
