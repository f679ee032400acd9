"""A machine for the pickles that torch.save writes, and for nothing else.

Pickle is a program. This one runs without Python's unpickler: a class or function named by the file
is looked up in the table CALLS of stand-ins; what any other would make is an `Opaque` with its full
name, which stands beside the weights unread or is refused among them. So nothing that a file names
is imported or executed.
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


OPCODES = 2**20  # a pickle of the largest published model has a hundred thousand
NAME_LENGTH = 256  # characters of a class's full name
WHOLE = 2**63  # what sizes, offsets and strides stay below


class Refused(Exception):
    """The pickle holds something that is not a tensor, or is not well formed. The text says
    what."""


@dataclasses.dataclass(frozen=True, eq=False)
class Opaque:
    """What the file would have called, or built, and this machine does not. `text` says it."""

    text: str


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
        or any(type(v) is not int or not 0 <= v < WHOLE for v in values)
    ):
        raise Refused(f"a tensor's {what} is {_shown(values)}")
    return tuple(values)


def _shown(value) -> str:
    """A value for a message: short, whatever the file has put there (tuples of tuples of one
    tuple print for ever, and so do numbers of a million digits)."""
    if isinstance(value, tuple | list):
        inside = ", ".join(
            repr(v) if type(v) is int and abs(v) < WHOLE else type(v).__name__ for v in value[:8]
        )
        more = ", ..." if len(value) > 8 else ""
        return f"({inside}{',' if len(value) == 1 else ''}{more})"
    return repr(value) if type(value) is int and abs(value) < WHOLE else type(value).__name__


def _view(storage, dtype, offset, shape, strides) -> View | Opaque:
    """Checks that the view lies inside its storage."""
    if isinstance(storage, Opaque):
        return storage
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


def _rebuild_tensor(storage, offset, shape, strides, *_) -> View | Opaque:
    return _view(storage, getattr(storage, "dtype", None), offset, shape, strides)


def _rebuild_tensor_v3(
    storage, offset, shape, strides, requires_grad, hooks, dtype, *_
) -> View | Opaque:
    if not isinstance(dtype, _Name) or dtype.text.removeprefix("torch.") not in TORCH_DTYPES:
        raise Refused(f"a tensor's dtype is {getattr(dtype, 'text', type(dtype).__name__)}")
    return _view(
        storage, DTYPES[TORCH_DTYPES[dtype.text.removeprefix("torch.")]], offset, shape, strides
    )


def _rebuild_parameter(data, *_) -> View | Opaque:
    if not isinstance(data, View | Opaque):
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
    "torch.device": lambda *_: "a device",
    "collections.OrderedDict": _ordered_dict,
}
# Names that are values, not calls.
VALUES = {
    *(f"torch.{name}" for name in (*STORAGES, *TORCH_DTYPES)),
    *(f"torch.storage.{name}" for name in ("UntypedStorage", "TypedStorage")),
}


def _put(target, key, value) -> None:
    """target[key] = value for plain keys: hashing a nested tuple can take for ever, so other keys
    become opaque ones."""
    if isinstance(target, Opaque):
        return
    if not isinstance(target, dict):
        raise Refused(f"a {type(key).__name__} is the key of a {type(target).__name__}")
    plain = isinstance(key, str | int)
    target[key if plain else Opaque(f"a {type(key).__name__} as a key")] = value


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
    "BINBYTES8",
    "BYTEARRAY8",
}
EMPTY = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: Opaque("a set"),
}
NEW = {"NEWOBJ": 2, "NEWOBJ_EX": 3}  # what they take from the stack: a class, and its arguments
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def load(data: bytes) -> Any:
    """The object that a torch pickle describes: dicts, lists, plain values, Views, and Opaque for
    everything else. Raises Refused."""
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name == "STOP":
                return machine.stack.pop()
            if count == OPCODES:
                raise Refused(f"its pickle has more than {OPCODES} steps")
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
            name, module = stack.pop(), stack.pop()
            if not isinstance(name, str) or not isinstance(module, str):
                raise TypeError("a name is no text")
            stack.append(_named(f"{module[:NAME_LENGTH]}.{name[:NAME_LENGTH]}"))
        elif op not in ("PROTO", "FRAME"):
            self.build(op)

    def build(self, op: str) -> None:
        """Opcodes that take several things from the stack."""
        stack = self.stack
        if op == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif op == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_called(function, arguments))
        elif op in NEW:
            made = Opaque(_text(stack[-NEW[op]]))
            stack[-NEW[op] :] = [made]
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
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
            elif not isinstance(stack[-1], Opaque):
                raise TypeError("append to something else than a list")
        elif op == "ADDITEMS":
            self.since_mark()
        elif op == "FROZENSET":
            self.since_mark()
            stack.append(Opaque("a frozenset"))
        elif op == "BUILD":
            stack.pop()  # attributes, such as a state dict's _metadata: not needed
        elif op == "POP":
            stack.pop()
        elif op == "POP_MARK":
            self.since_mark()
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


def _named(text: str) -> _Name | Opaque:
    """A name that tensors need, or what stands for any other."""
    return _Name(text) if text in CALLS or text in VALUES else Opaque(text[: 2 * NAME_LENGTH])


def _text(function) -> str:
    """What a message says of a thing that is called."""
    return getattr(function, "text", type(function).__name__)


def _called(function, arguments):
    """What a call makes: a stand-in's result, or what stands for the call."""
    if isinstance(function, _Name) and function.text in CALLS:
        return CALLS[function.text](*arguments)
    return Opaque(_text(function))


def _storage(pid) -> Storage | Opaque:
    """('storage', type, key, device, element count)"""
    if (
        not isinstance(pid, tuple)
        or len(pid) != 5
        or pid[0] != "storage"
        or not isinstance(pid[1], _Name | Opaque)
        or not isinstance(pid[2], str)
    ):
        raise Refused("it refers to something outside that is not a storage")
    name = pid[1].text.rpartition(".")[2]
    if isinstance(pid[1], Opaque) or name not in STORAGES:
        return Opaque(pid[1].text)
    return Storage(pid[2], DTYPES[STORAGES[name]], _whole((pid[4],), "size")[0])
