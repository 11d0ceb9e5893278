"""`.pdparams` files (pickles written by `paddle.save`) without executing anything from them.

A pickle is a program. This reader runs the dozen instructions that describe dictionaries, strings,
numbers and numpy arrays, resolves the six names that Paddle's files mention to plain stand-ins of
its own, and refuses every other instruction and name. Array bytes are not copied: the pickle
machine reads from a mapped file, and large reads return views of the mapping.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from fastdeploy_lite.checkpoint.tensor import Array, HostTensor, TensorInfo
from fastdeploy_lite.utils.errors import CheckpointError, one_line, quote
from fastdeploy_lite.utils.files import check_regular, refuse_pointer

# numpy type -> name as safetensors has it. Paddle stores bfloat16 as uint16 and has no uint16.
_NAMES = {
    "u2": "BF16",
    "f2": "F16",
    "f4": "F32",
    "f8": "F64",
    "i1": "I8",
    "u1": "U8",
    "i2": "I16",
    "i4": "I32",
    "i8": "I64",
    "b1": "BOOL",
}
# paddle.save adds these to a state dict: a name table, and parts of arrays of more than 1 GiB
# (pickle protocols 2 and 3 only).
_NAME_TABLE, _PARTS_TABLE = "StructuredToParameterName@@", "UnpackBigParamInfor@@"
_VIEW_FROM = 4096  # bytes; smaller reads are copied, which is cheaper than keeping a view


class PdparamsFile:
    """The arrays of one `.pdparams` file; the same face as `SafetensorsFile`."""

    def __init__(self, path: Path) -> None:
        """Read the structure of `path`; raise CheckpointError if it is not plain arrays."""
        self.path = path
        self._map = _map_file(path)
        refuse_pointer(path, self._map[:64])
        try:
            state = _Unpickler(cast(Any, _MappedReader(self._map))).load()
            self._arrays = _arrays_of(state)
        # A damaged pickle fails in the machine's own ways: KeyError for an unknown instruction,
        # IndexError for an empty stack, UnicodeDecodeError, MemoryError, TypeError ...
        except Exception as error:
            reason = one_line(error) or type(error).__name__
            raise CheckpointError(f"{path}: not a file of plain arrays: {reason}") from None
        self.infos = {
            key: TensorInfo(key, _NAMES[array.dtype.str[1:]], array.shape, array.nbytes, path)
            for key, array in self._arrays.items()
        }

    def get(self, key: str) -> HostTensor:
        """Return a read-only view of tensor `key`, which must be in `infos`."""
        if self.path.stat().st_size < len(self._map):  # reading past the end would be SIGBUS
            raise CheckpointError(f"{self.path}: {key}: the file shrank while it was being read")
        array = self._arrays[key]
        if not array.flags.aligned:  # pickles align nothing
            array = array.copy()
            array.flags.writeable = False
        return HostTensor(array, self.infos[key].dtype, key, self.path)

    def release(self) -> None:
        """Give the resident pages of the mapping back; views stay valid and fault in again."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _map_file(path: Path) -> mmap.mmap:
    check_regular(path, 1 << 62)  # opening a named pipe would wait for ever
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CheckpointError(f"{path}: the file is empty")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be opened: {error}") from None


class _MappedReader:
    """A binary file over a mapping whose large reads are views."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._view = memoryview(mapping)
        self._mapping = mapping
        self._at = 0

    def read(self, count: int) -> bytes | memoryview:
        end = self._at + count
        if count < 0 or end > len(self._view):
            raise EOFError("the file is truncated")
        view = self._view[self._at : end]
        self._at = end
        return view if count >= _VIEW_FROM else bytes(view)

    def readline(self) -> bytes:
        end = self._mapping.find(b"\n", self._at, self._at + _VIEW_FROM)
        if end < 0:
            raise EOFError("the file is truncated")
        return cast(bytes, self.read(end + 1 - self._at))


class _DType:
    """Stand-in for `numpy.dtype` while unpickling."""

    def __init__(self, name: object, *_flags: object) -> None:
        if not isinstance(name, str) or name.lstrip("<|=") not in _NAMES:
            raise ValueError(f"array type {quote(name) if isinstance(name, str) else type(name)}")
        self.dtype = np.dtype(name.lstrip("<|=")).newbyteorder("<")

    def set_state(self, state: object) -> None:
        byte_order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if not isinstance(byte_order, str) or byte_order not in ("<", "|", "="):
            raise ValueError("an array that is not little-endian")


class _Array:
    """Stand-in for `numpy.ndarray` while unpickling."""

    def __init__(self, *_arguments: object) -> None:
        self.value: Array | None = None

    def set_state(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("an array whose state is not (version, shape, type, order, bytes)")
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _DType) or not isinstance(data, (bytes, memoryview)):
            raise ValueError("an array of objects")
        if (
            not isinstance(shape, tuple)
            or len(shape) > 32
            or not all(type(size) is int and 0 <= size < 1 << 48 for size in shape)
            or math.prod(max(size, 1) for size in shape) > 1 << 48
        ):
            raise ValueError("an array with an impossible shape")
        expected = math.prod(shape) * dtype.dtype.itemsize
        if len(data) != expected:
            raise ValueError(f"an array of {len(data)} bytes, expected {expected}")
        flat = np.frombuffer(data, dtype.dtype)
        if fortran is True:
            flat = np.ascontiguousarray(flat.reshape(shape, order="F"))
        self.value = flat.reshape(shape)


def _encode(text: object, encoding: object) -> bytes:
    """Stand-in for `_codecs.encode`, by which protocol 2 spells bytes."""
    if not isinstance(text, str) or not isinstance(encoding, str) or encoding != "latin1":
        raise ValueError("bytes in an unknown spelling")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Stand-in for `bytes`, by which protocol 2 spells an array without elements."""
    return b""


def _pair(items: object) -> object:
    """Stand-in for `tuple`: paddle.save spells a nested tensor as tuple((name, array))."""
    if not isinstance(items, tuple) or len(items) != 2:
        raise ValueError("a tuple that is not (name, array)")
    return items[1]


_Standin = Callable[..., object]
_ADMITTED: dict[tuple[str, str], _Standin] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
    ("builtins", "tuple"): _pair,
    ("__builtin__", "tuple"): _pair,
}
_OPCODES = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT"
    " BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8"
    " EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS"
    " BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD"
)


class _Dispatch(dict[int, Callable[[Any], None]]):
    def __missing__(self, opcode: int) -> Callable[[Any], None]:
        raise pickle.UnpicklingError(f"instruction {opcode:#04x}, which no array needs")


# The Python implementation, because the C one can neither drop instructions nor read views.
class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = _Dispatch(
        (getattr(pickle, name)[0], pickle._Unpickler.dispatch[getattr(pickle, name)[0]])
        for name in _OPCODES.split()
    )
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for an admitted name."""
        standin = _ADMITTED.get((module, name))
        if standin is None:
            raise pickle.UnpicklingError(f"it asks for {one_line(module)}.{one_line(name)}")
        return standin

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(arguments, tuple) or function not in _ADMITTED.values():
            raise pickle.UnpicklingError("it calls something that is not an array")
        self.stack[-1] = function(*arguments)

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, (_DType, _Array)):
            raise pickle.UnpicklingError("it sets the state of something that is not an array")
        target.set_state(state)

    def _set_items(self) -> None:
        items = cast(Any, self).pop_mark()
        self._store(items)

    def _set_item(self) -> None:
        value = self.stack.pop()
        self._store([self.stack.pop(), value])

    def _store(self, items: list[Any]) -> None:
        target = self.stack[-1]
        # Other keys have no use, and hashing a nested tuple that shares its parts takes for ever.
        if type(target) is not dict or not all(isinstance(key, (str, int)) for key in items[::2]):
            raise pickle.UnpicklingError("a dictionary with keys that are not names")
        target.update(zip(items[::2], items[1::2], strict=True))

    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.SETITEMS[0]] = _set_items
    dispatch[pickle.SETITEM[0]] = _set_item


def _arrays_of(state: object) -> dict[str, Array]:
    if not isinstance(state, dict):
        raise ValueError(f"the top level is a {type(state).__name__}, expected a dictionary")
    arrays: dict[str, Array] = {}
    for key, value in state.items():
        if isinstance(value, _Array) and isinstance(key, str):
            if value.value is None:
                raise ValueError(f"{key}: an array without data")
            arrays[key] = value.value
    parts = state.get(_PARTS_TABLE)
    return _join_parts(arrays, parts) if isinstance(parts, dict) else arrays


def _join_parts(arrays: dict[str, Array], table: dict[Any, Any]) -> dict[str, Array]:
    """Rebuild arrays that paddle.save cut: {name: {"OriginShape": shape, "slices": [names]}}."""
    for name, entry in table.items():
        if not isinstance(name, str):
            raise ValueError(f"{_PARTS_TABLE} names no array")
        pieces = [arrays.pop(part) for part in entry["slices"]]
        arrays[name] = np.concatenate([p.reshape(-1) for p in pieces]).reshape(entry["OriginShape"])
    return arrays
