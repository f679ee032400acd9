"""A machine for the pickles that torch.save writes, and for nothing else.

Pickle is a program. This one runs without Python's unpickler: a class or function named by the file
is looked up in the table CALLS of stand-ins and otherwise refused by its full name, so nothing that
a file names is imported or executed.
Opcodes: CPython Lib/pickletools.py; what torch writes: pytorch/pytorch torch/_utils.py,
         torch/serialization.py.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any

from tdjax.checkpoints.published.tensor import DTYPES, EXPANDED_BYTES, row_strides, span

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "Float8_e4m3fnStorage": "F8_E4M3",
    "Float8_e5m2Storage": "F8_E5M2",
    "UntypedStorage": "U8",
}
TORCH_DTYPES = {
    "float64": "F64",
    "double": "F64",
    "float32": "F32",
    "float": "F32",
    "float16": "F16",
    "half": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


class Refused(Exception):
    """The pickle holds something that is not a tensor, or is not well formed. The text says
    what."""


@dataclasses.dataclass(frozen=True)
class _Name:
    """A class or function named by the file."""

    text: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """An entry of the archive: `size` elements of `dtype`."""

    key: str
    dtype: Any
    size: int


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor: a strided view of a storage; offset and strides in elements of `dtype`."""

    storage: Storage
    dtype: Any
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _whole(values, what: str) -> tuple[int, ...]:
    """A tuple of non-negative integers, at most 64 of them."""
    if (
        not isinstance(values, tuple | list)
        or len(values) > 64
        or any(type(v) is not int or v < 0 for v in values)
    ):
        raise Refused(f"a tensor's {what} is {str(values)[:80]}")
    return tuple(values)


def _view(storage, dtype, offset, shape, strides) -> View:
    """Checks that the view lies inside its storage."""
    if not isinstance(storage, Storage):
        raise Refused(f"a tensor's storage is a {type(storage).__name__}")
    (offset,) = _whole((offset,), "offset")
    out = View(storage, dtype, offset, _whole(shape, "shape"), _whole(strides, "strides"))
    if len(out.shape) != len(out.strides):
        raise Refused(f"a tensor has shape {out.shape} but strides {out.strides}")
    item = dtype.itemsize
    held, touched = (
        storage.size * storage.dtype.itemsize,
        (offset + span(out.shape, out.strides)) * item,
    )
    if 0 not in out.shape and touched > held:
        raise Refused(
            f"a tensor of shape {out.shape} needs {touched} bytes of storage {storage.key!r}, which"
            f" has {held}"
        )
    size = row_strides((1, *out.shape))[0] * item
    if size > max(held, EXPANDED_BYTES):
        raise Refused(f"a tensor of shape {out.shape} is a repetition of {held} bytes into {size}")
    return out


def _rebuild_tensor(storage, offset, shape, strides, *_) -> View:
    return _view(storage, getattr(storage, "dtype", None), offset, shape, strides)


def _rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, *_) -> View:
    if not isinstance(dtype, _Name) or dtype.text.removeprefix("torch.") not in TORCH_DTYPES:
        raise Refused(f"a tensor's dtype is {getattr(dtype, 'text', type(dtype).__name__)}")
    return _view(
        storage, DTYPES[TORCH_DTYPES[dtype.text.removeprefix("torch.")]], offset, shape, strides
    )


def _rebuild_parameter(data, *_) -> View:
    if not isinstance(data, View):
        raise Refused(f"a parameter holds a {type(data).__name__}")
    return data


def _ordered_dict(pairs=()) -> dict:
    if not isinstance(pairs, list | tuple) or any(
        not isinstance(p, list | tuple) or len(p) != 2 for p in pairs
    ):
        raise Refused("an OrderedDict is made of something else than pairs")
    out: dict = {}
    for key, value in pairs:
        _put(out, key, value)
    return out


def _size(values=()) -> tuple:
    return _whole(values, "Size")


CALLS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch.Size": _size,
    "torch.device": lambda kind="cpu", *_: str(kind),
    "collections.OrderedDict": _ordered_dict,
}
# Names that are values, not calls.
VALUES = {
    *(f"torch.{name}" for name in (*STORAGES, *TORCH_DTYPES)),
    *(f"torch.storage.{name}" for name in ("UntypedStorage", "TypedStorage")),
}


def _put(target, key, value) -> None:
    """target[key] = value for plain keys: hashing a nested tuple can take for ever."""
    if not isinstance(target, dict) or not isinstance(key, str | int):
        raise Refused(f"a {type(key).__name__} is the key of a {type(target).__name__}")
    target[key] = value


MARK = object()
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "SHORT_BINBYTES",
    "BINBYTES",
}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def load(data: bytes) -> Any:
    """The object that a torch pickle describes: dicts, lists, plain values and Views. Raises
    Refused."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, UnicodeDecodeError) as e:
        raise Refused(f"its pickle is malformed ({type(e).__name__}: {e})") from e
    raise Refused("its pickle has no end")


class _Machine:
    """Stack and memo of one pickle."""

    def __init__(self):
        self.stack: list = []
        self.memo: dict[int, Any] = {}

    def step(self, op: str, argument) -> None:
        stack = self.stack
        if op in LITERALS:
            stack.append(argument)
        elif op in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif op in CONSTANTS:
            stack.append(CONSTANTS[op])
        elif op in EMPTY:
            stack.append(EMPTY[op]())
        elif op in TUPLES:
            n = TUPLES[op]
            if len(stack) < n:
                raise IndexError("stack is empty")
            stack[-n:] = [tuple(stack[-n:])]
        elif op == "MARK":
            stack.append(MARK)
        elif op == "GLOBAL":
            stack.append(_named(argument.replace(" ", ".")))
        elif op == "STACK_GLOBAL":
            name = stack.pop()
            stack.append(_named(f"{stack.pop()}.{name}"))
        elif op not in ("PROTO", "FRAME"):
            self.build(op)

    def build(self, op: str) -> None:
        """Opcodes that take several things from the stack."""
        stack = self.stack
        if op == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif op == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            if not isinstance(function, _Name) or function.text not in CALLS:
                raise Refused(f"it calls {getattr(function, 'text', type(function).__name__)}")
            stack.append(CALLS[function.text](*arguments))
        elif op == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif op == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _put(stack[-1], key, value)
        elif op == "SETITEMS":
            items = self.since_mark()
            for key, value in zip(items[::2], items[1::2], strict=True):
                _put(stack[-1], key, value)
        elif op in ("APPEND", "APPENDS"):
            items = self.since_mark() if op == "APPENDS" else [stack.pop()]
            if not isinstance(stack[-1], list):
                raise TypeError("append to something else than a list")
            stack[-1].extend(items)
        elif op == "BUILD":
            stack.pop()  # attributes, such as a state dict's _metadata: not needed
        else:
            raise Refused(
                f"it uses the pickle opcode {op}, which torch.save does not need for tensors"
            )

    def since_mark(self) -> list:
        """What was pushed since the last mark, taken off the stack with it."""
        at = len(self.stack) - 1
        while self.stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise IndexError("no mark")
        out = self.stack[at + 1 :]
        del self.stack[at:]
        return out


def _named(text: str) -> _Name:
    if text not in CALLS and text not in VALUES:
        raise Refused(f"it names {text}, which is not part of a tensor")
    return _Name(text)


def _storage(pid) -> Storage:
    """('storage', type, key, device, element count)"""
    if (
        not isinstance(pid, tuple)
        or len(pid) != 5
        or pid[0] != "storage"
        or not isinstance(pid[1], _Name)
        or not isinstance(pid[2], str)
    ):
        raise Refused("it refers to something outside that is not a storage")
    name = pid[1].text.rpartition(".")[2]
    if name not in STORAGES:
        raise Refused(f"a storage is a {pid[1].text}")
    return Storage(pid[2], DTYPES[STORAGES[name]], _whole((pid[4],), "size")[0])
