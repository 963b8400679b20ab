"""A pickle of tensors stepped through, not executed: no import, no call, bounded by its own length.

A pickle is a program. This interpreter knows the few instructions `torch.save` writes for a flat dict of tensors and
refuses every other one by name.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from peftcli.errors import printable

DTYPES = {
    "torch DoubleStorage": "F64",
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ShortStorage": "I16",
    "torch CharStorage": "I8",
    "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
}
"""Storage classes by the dtype they hold (safetensors' names)."""

ORDERED_DICT = "collections OrderedDict"
REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
GLOBALS = frozenset({*DTYPES, ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER})

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT"})
MEMO = frozenset({"BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"})
OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
MARK = object()
MAX_DIMENSIONS = 64


@dataclass(frozen=True)
class Name:
    """A global the pickle mentions; never imported."""

    text: str


@dataclass(frozen=True)
class Storage:
    """A storage the pickle refers to: its dtype, its member of the archive and its length in elements."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def run_pickle(program: bytes) -> Any:
    """The value a pickle builds, made of dicts, lists, tuples, numbers, text, `Name`, `Storage` and `StoredTensor`.

    Raises:
        ValueError: naming what the pickle wants beyond that.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for name, argument in _instructions(program):
            _step(name, argument, stack, memo)
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError("its pickle is broken") from error
    if len(stack) != 1:
        raise ValueError("its pickle leaves something behind beside the tensors")
    return stack[0]


def _instructions(program: bytes) -> Iterator[tuple[str, Any]]:
    """Name and argument of each instruction up to STOP; an unknown one is refused before its argument is read."""
    stream = io.BytesIO(program)
    while code := stream.read(1):
        opcode = OPCODES.get(code)
        if opcode is None:
            raise ValueError("its pickle is broken")
        if opcode.name == "STOP":
            return
        if opcode.name not in KNOWN:
            raise ValueError(f"its pickle uses the instruction {opcode.name}, which no file of tensors needs")
        if opcode.name == "GLOBAL":  # pickletools would take backslashes in the name as escapes
            yield opcode.name, f"{_line(stream)} {_line(stream)}"
        else:
            yield opcode.name, opcode.arg.reader(stream) if opcode.arg else None
    raise ValueError("its pickle has no end")


def _line(stream: io.BytesIO) -> str:
    return stream.readline().removesuffix(b"\n").decode("utf-8")


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in ("PROTO", "FRAME"):
        return
    if name in LITERALS:
        stack.append(argument)
    elif name in CONSTANTS:
        stack.append(CONSTANTS[name])
    elif name == "GLOBAL":
        if argument not in GLOBALS:
            raise ValueError(f"it wants to import `{printable(argument)}`")
        stack.append(Name(argument))
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "MARK":
        stack.append(MARK)
    else:
        BUILDERS[name](stack)


def _popped_to_mark(stack: list[Any]) -> list[Any]:
    items = []
    while (item := stack.pop()) is not MARK:
        items.append(item)
    return items[::-1]


def _set_items(stack: list[Any]) -> None:
    items = _popped_to_mark(stack)
    _into_dict(stack, zip(items[::2], items[1::2], strict=True))


def _set_item(stack: list[Any]) -> None:
    value, key = stack.pop(), stack.pop()
    _into_dict(stack, [(key, value)])


def _into_dict(stack: list[Any], pairs: Iterable[tuple[Any, Any]]) -> None:
    if not isinstance(stack[-1], dict):
        raise ValueError("its pickle sets items of something that is no dict")
    for key, value in pairs:
        if not isinstance(key, str):  # hashing a deeply nested tuple would overflow the C stack
            raise ValueError(f"its pickle has a key that is a {type(key).__name__}, not text")
        stack[-1][key] = value


def _reduce(stack: list[Any]) -> None:
    arguments, function = stack.pop(), stack.pop()
    stack.append(_call(function, arguments))


def _build(stack: list[Any]) -> None:
    """Attributes of a state dict (`_metadata`), which say nothing about the tensors."""
    stack.pop()
    if not isinstance(stack[-1], dict):
        raise ValueError("its pickle sets attributes of something that is no dict")


def _persistent(stack: list[Any]) -> None:
    kind, dtype, key, _, numel = stack.pop()
    if kind != "storage" or not isinstance(dtype, Name) or dtype.text not in DTYPES or not isinstance(key, str):
        raise ValueError("its pickle refers to something that is no storage")
    stack.append(Storage(DTYPES[dtype.text], key, _size(numel)))


BUILDERS: dict[str, Callable[[list[Any]], None]] = {
    "EMPTY_DICT": lambda stack: stack.append({}),
    "EMPTY_TUPLE": lambda stack: stack.append(()),
    "TUPLE": lambda stack: stack.append(tuple(_popped_to_mark(stack))),
    "TUPLE1": lambda stack: stack.append((stack.pop(),)),
    "TUPLE2": lambda stack: stack.append((stack.pop(), stack.pop())[::-1]),
    "TUPLE3": lambda stack: stack.append((stack.pop(), stack.pop(), stack.pop())[::-1]),
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "REDUCE": _reduce,
    "BUILD": _build,
    "BINPERSID": _persistent,
}
KNOWN = frozenset({"PROTO", "FRAME", "GLOBAL", "MARK", *MEMO, *LITERALS, *CONSTANTS, *BUILDERS})


def _call(function: Any, arguments: Any) -> Any:
    """What the three known functions give; none of them is called."""
    name = function.text if isinstance(function, Name) else ""
    if name == ORDERED_DICT and arguments == ():
        return {}
    if name == REBUILD_PARAMETER and isinstance(arguments[0], StoredTensor):
        return arguments[0]
    if name == REBUILD_TENSOR and isinstance(arguments[0], Storage):
        storage, offset, shape, strides = arguments[:4]
        if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"its pickle holds a tensor of {len(shape)} dimensions with {len(strides)} strides")
        return StoredTensor(storage, _size(offset), tuple(map(_size, shape)), tuple(map(_size, strides)))
    raise ValueError("its pickle calls something that builds no tensor")


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("its pickle holds a size that is no whole number from 0 on")
    return value
