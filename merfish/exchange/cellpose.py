"""Read the masks of Cellpose's ``_seg.npy``, a pickled dictionary, without executing code.

Unpickling calls any function that a file names. Here the opcodes of the pickle are interpreted on plain values only:
names and calls remain descriptions, and the only call that is evaluated is NumPy's constructor of an array.
"""

from __future__ import annotations

import math
import os
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merfish.errors import InputError

MOST_BYTES = 1 << 32
_HOW = "save the masks as .tif or .npy (cellpose: --save_tif, or numpy.save of its masks) and give that file"
_ARRAY = "_reconstruct"


@dataclass
class _Call:
    """A call that the pickle requests, and the state that it would set on the result; neither is executed."""

    name: str
    arguments: Any
    state: Any = None


def read_seg_npy(path: str | os.PathLike[str]) -> np.ndarray:
    """Read the masks (y, x) or (z, y, x) from a file written by Cellpose's interface or ``--save_npy``.

    Raises InputError, with advice to save the masks in another format, for a file with a different structure.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes, expected at most {MOST_BYTES}; {_HOW}")
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
            )
            dtype = read_header(file)[2]
            if dtype != np.dtype(object):
                raise InputError(
                    f"{path}: a plain array of {dtype}, not Cellpose's dictionary; remove _seg from the file name"
                )
            content = _array_items(_follow(file.read()))
        masks = next(value["masks"] for value in content if isinstance(value, dict) and "masks" in value)
        return _plain_array(masks)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can cause any error
        raise InputError(f"{path}: no masks found in Cellpose's structure; {_HOW}") from error


def _array_items(array: Any) -> list[Any]:
    """Return the items of an array of objects, from its description."""
    if not (isinstance(array, _Call) and array.name.endswith(_ARRAY)):
        raise ValueError("not an array")
    return list(array.state[4])


def _plain_array(array: Any) -> np.ndarray:
    """Return an array of integers, from its description: version, shape, dtype, Fortran order, bytes."""
    if not (isinstance(array, _Call) and array.name.endswith(_ARRAY)):
        raise ValueError("not an array")
    _, shape, kind, fortran, content = array.state
    dtype = np.dtype(str(kind.arguments[0])).newbyteorder(kind.state[1] if kind.state[1] in "<>" else "=")
    if dtype.kind not in "iu" or len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError("not integers, or truncated")
    values = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
    return values.astype(dtype.newbyteorder("="))


def _follow(content: bytes) -> Any:
    """Return the content of a pickle as plain values and `_Call`. Raises ValueError for an unknown opcode."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for operation, argument, _ in pickletools.genops(content):
        name = operation.name
        if name == "STOP":
            return stack.pop()
        if name in ("PROTO", "FRAME"):
            continue
        if name == "MARK":
            marks.append(len(stack))
        elif name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name in ("TUPLE", "LIST"):
            stack.append((tuple if name == "TUPLE" else list)(since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            stack[-n:] = [tuple(stack[-n:])]
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else since_mark()
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            pairs = [stack.pop(-2), stack.pop()] if name == "SETITEM" else since_mark()
            stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(str(argument).replace(" ", "."))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [f"{stack[-2]}.{stack[-1]}"]
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_Call(str(stack.pop()), arguments))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        elif name in ("POP", "POP_MARK"):
            stack.pop() if name == "POP" else since_mark()
        else:
            raise ValueError(f"operation {name}")
    raise ValueError("no end")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "SHORT_BINUNICODE",
    "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8", "SHORT_BINSTRING",
}  # fmt: skip
