"""A `.bin` is read as torch would read it, as long as it holds tensors and nothing else; nothing in it is ever run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcli.adapters.pickle_header import read_pickle_header
from peftcli.adapters.values import read_array
from peftcli.errors import InputError

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(3)}


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def zipped(program: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        for name, content in members.items():
            archive.writestr(f"archive/{name.replace('_', '/')}", content)
    return buffer.getvalue()


def read(content: bytes, folder: Path) -> Any:
    path = folder / "adapter_model.bin"
    path.write_bytes(content)
    return read_pickle_header(path)


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
def test_every_dtype(dtype: str, tmp_path: Path) -> None:
    tensor = torch.tensor([[0, 1, 1]]).to(getattr(torch, dtype))
    info = read(saved({"t": tensor}), tmp_path).tensors["t"]
    content = (tmp_path / "adapter_model.bin").read_bytes()[info.start : info.stop]
    assert info.shape == (1, 3)
    assert content == tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("wrap", [dict, OrderedDict, lambda state: torch.nn.ParameterDict(state).state_dict()])
def test_state_dicts(wrap: Any, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in STATE.items() if tensor.is_floating_point()}
    assert read(saved(wrap(state)), tmp_path).tensors.keys() == state.keys()


def test_parameters_and_views(tmp_path: Path) -> None:
    matrix = torch.arange(24.0).reshape(4, 6)
    state = {"p": torch.nn.Parameter(matrix), "row": matrix[1], "t": matrix.T, "slice": matrix[:, 2:4], "0": matrix[:0]}
    file = read(saved(state), tmp_path)
    with file.path.open("rb") as opened:
        for name, tensor in state.items():
            np.testing.assert_array_equal(read_array(opened, file.tensors[name]), tensor.detach().numpy())


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def test_nothing_is_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for content in (saved(Bomb(canary)), saved({**STATE, "x": Bomb(canary)}), pickle.dumps(Bomb(canary))):
        with pytest.raises(InputError):
            read(content, tmp_path)
    assert not canary.exists()


def member(name: str, content: bytes) -> bytes:
    """A good file with one member replaced."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(STATE))) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, content if entry.filename.endswith(name) else old.read(entry))
    return buffer.getvalue()


nested = b"\x80\x02" + b")" + b"\x85" * 200_000 + b"N"  # a tuple in a tuple in ..., as the key of a dict

REFUSED = {
    "empty": (b"", "empty"),
    "not a zip": (b"hello", "no zip archive"),
    "bare pickle": (pickle.dumps({}), "no zip archive"),
    "cut in half": (saved(STATE)[:400], "no zip archive"),
    "eval": (zipped(b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R."), "builtins eval"),
    "a module of torch": (zipped(b"\x80\x02ctorch\nload\n."), "torch load"),
    "instance": (zipped(b"\x80\x02(ios\nsystem\n."), "the instruction INST"),
    "stack global": (zipped(b"\x80\x04\x8c\x02os\x8c\x06system\x93."), "STACK_GLOBAL"),
    "list": (saved([STATE]), "EMPTY_LIST"),
    "text as value": (saved({"a": "b"}), "is a str, not a tensor"),
    "nested dict": (saved({"a": STATE}), "is a dict, not a tensor"),
    "number as key": (saved({1: STATE["a"]}), "a key that is a int"),
    "endless name": (saved({"n" * 1000: STATE["a"]}), "a name of 1,000 characters"),
    "deep key": (zipped(b"\x80\x02}" + nested[2:] + b"s."), "a key that is a tuple"),
    "memo index": (zipped(b"\x80\x02}r\xff\xff\xff\xffj\xff\xff\xff\xfe."), "broken"),
    "stack underflow": (zipped(b"\x80\x02R."), "broken"),
    "no stop": (zipped(b"\x80\x02}"), "pickle"),
    "left on the stack": (zipped(b"\x80\x02}}."), "leaves something behind"),
    "huge bytes": (zipped(b"\x80\x05\x8e" + (1 << 60).to_bytes(8, "little") + b"."), "bytes"),
    "deflated": (zipped(b"\x80\x02}.", zipfile.ZIP_DEFLATED, data_0=bytes(10**6)), "compressed"),
    "no pickle": (zipped(b"")[:0] + member("data.pkl", b""), "pickle"),
    "big-endian": (member("byteorder", b"big"), "little-endian"),
    "short storage": (member("data/0", bytes(8)), "the archive holds 8 bytes"),
    "long storage": (member("data/0", bytes(800)), "the archive holds 800 bytes"),
}


@pytest.mark.parametrize(("content", "says"), REFUSED.values(), ids=REFUSED)
def test_refused(content: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(content, tmp_path)
    assert says in str(caught.value)
    assert "adapter_model.bin" in str(caught.value)


def test_a_storage_that_lies(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(saved({"a": torch.ones(4)}))) as archive:
        program = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert program.count(b"K\x04") == 2  # elements of the storage, and the tensor's size
    for old, new in ((b"K\x04t", b"J\x00\xca\x9a\x3bt"), (b"K\x04\x85", b"K\x05\x85")):
        assert old in program
        with pytest.raises(InputError, match=r"declares a storage|reaches beyond"):
            read(zipped(program.replace(old, new, 1), data_0=bytes(16)), tmp_path)


GOOD = saved(STATE)


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255))
def test_any_changed_byte(place: int, byte: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = bytearray(GOOD)
    content[place] = byte
    with contextlib.suppress(InputError):
        read(bytes(content), tmp_path_factory.getbasetemp())


@settings(max_examples=300, deadline=None)
@given(program=st.binary(max_size=60))
def test_any_program(program: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    with contextlib.suppress(InputError):
        read(zipped(b"\x80\x02" + program), tmp_path_factory.getbasetemp())
