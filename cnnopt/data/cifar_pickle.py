"""Evaluate the pickles in which CIFAR is published, and no others.

pickle.Unpickler is not safe enough, even with a restricted find_class. Its C code sizes the memo by an index in the
file, so one damaged byte (a BINPUT read as LONG_BINPUT) makes it allocate up to 64 GiB. Nested tuples as keys make
hashing take for ever. This module imports and calls no global, and its time and memory follow the size of the file.
"""

from __future__ import annotations

import enum
import pickletools
from typing import Any

import numpy as np

# The largest published pickle, the training file of CIFAR-100, has some 250,000 opcodes. Two million take seconds.
_MAX_OPCODES = 2_000_000


class _Global(enum.Enum):
    """A stand-in for each global that the published files name."""

    ENCODE = enum.auto()
    RECONSTRUCT = enum.auto()
    NDARRAY = enum.auto()
    DTYPE = enum.auto()
    UINT8 = enum.auto()


_GLOBALS = {
    "_codecs encode": _Global.ENCODE,  # how Python 3 writes bytes in protocol 2
    "numpy.core.multiarray _reconstruct": _Global.RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": _Global.RECONSTRUCT,  # numpy 2
    "numpy ndarray": _Global.NDARRAY,
    "numpy dtype": _Global.DTYPE,
}
_CONSTANTS = {
    "BININT", "BININT1", "BININT2", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE",
    "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
_EMPTY: dict[str, Any] = {
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
}  # fmt: skip


class Array:
    """A numpy array as the file describes it, not yet validated."""

    state: object = None

    def read(self) -> np.ndarray | None:
        """The validated array. None if it is not uint8, or if its shape does not match its bytes."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            return None
        _, shape, dtype, is_fortran, raw = self.state
        raw = raw.encode("latin-1") if isinstance(raw, str) else raw
        if dtype is not _Global.UINT8 or not isinstance(raw, bytes):
            return None
        if not isinstance(shape, tuple) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
            return None
        if shape[0] * shape[1] != len(raw):
            return None
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if is_fortran else "C")


def loads(data: bytes) -> dict[str, Any]:
    """The dictionary that a pickle holds, with keys as str. Arrays are returned as `Array`; call `read` on them.

    Raises ValueError, with a one-line message, for anything that a CIFAR pickle does not contain.
    """
    try:
        value = _evaluate(data)
    # Damaged bytes raise many kinds of exceptions: stack underflow, undefined opcodes, text that is not UTF-8.
    except Exception as error:
        raise ValueError(f"not a CIFAR pickle, or cut short ({error!r:.100})") from error
    if not isinstance(value, dict):
        raise ValueError("the pickle holds no dictionary")
    return value


def _evaluate(data: bytes) -> object:
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    encoded = 0
    argument: Any
    for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if count == _MAX_OPCODES:
            raise ValueError(f"more than {_MAX_OPCODES:,} opcodes")
        if name in _CONSTANTS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, marks.pop()
            if name == "TUPLE":
                stack.append(tuple(items))
            elif name == "APPENDS":
                _extend(stack[-1], items)
            else:
                _set_items(stack[-1], items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            stack[-size:] = [tuple(stack[-size:])]
        elif name == "APPEND":
            items = [stack.pop()]
            _extend(stack[-1], items)
        elif name == "SETITEM":
            items = [stack.pop(-2), stack.pop()]
            _set_items(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(_GLOBALS[argument])
        elif name == "STACK_GLOBAL":
            names = [stack.pop(-2), stack.pop()]
            stack.append(_GLOBALS[" ".join(names)])
        elif name == "REDUCE":
            arguments = stack.pop()
            value = _called(stack.pop(), arguments)
            # A malicious file could encode one string many times and take for ever. A real one encodes each once.
            encoded += len(value) if isinstance(value, bytes) else 0
            if encoded > len(data):
                raise ValueError("encodes more than it holds")
            stack.append(value)
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Array):
                stack[-1].state = state
            # The state of a dtype is byte order and alignment. It is ignored, because single bytes have neither.
            elif stack[-1] is not _Global.UINT8:
                raise ValueError("a state without an array")
        elif name == "STOP":
            if position != len(data) - 1 or marks or len(stack) != 1:
                raise ValueError("stops early")
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"opcode {name} is not allowed")
    return stack[0]


def _extend(target: object, items: list[Any]) -> None:
    if not isinstance(target, list):
        raise ValueError("items without a list")
    target.extend(items)


def _set_items(target: object, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("items without a dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Comparing long equal keys many times would take for ever.
        if not isinstance(key, (str, bytes)) or len(key) > 64:
            raise ValueError("a key that is not a short string")
        target[key.decode("latin-1") if isinstance(key, bytes) else key] = value


def _called(function: object, arguments: object) -> object:
    if isinstance(arguments, tuple) and arguments:
        if function is _Global.ENCODE and arguments[1:] in (("latin1",), (b"latin1",)) and type(arguments[0]) is str:
            return arguments[0].encode("latin-1")
        if function is _Global.RECONSTRUCT:
            return Array()
        if function is _Global.DTYPE and arguments[0] in ("u1", b"u1"):
            return _Global.UINT8
    raise ValueError("a call that the published files do not make")
