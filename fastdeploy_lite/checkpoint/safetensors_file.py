"""One safetensors file: a checked header and zero-copy views of the mapped data.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON
header {key: {dtype, shape, data_offsets}}, then the data without gaps. The header is checked here
for the sake of messages that name file and key, and by the safetensors library as the authority.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fastdeploy_lite.checkpoint.tensor import DTYPES, HostTensor, TensorInfo
from fastdeploy_lite.utils.errors import CheckpointError, quote
from fastdeploy_lite.utils.files import check_regular, refuse_pointer
from fastdeploy_lite.utils.json_fields import unique_keys

_MOST_ELEMENTS = 1 << 48
_LARGEST_HEADER = 100_000_000  # bytes; the library's own limit


class SafetensorsFile:
    """Header and mapping of one file. The mapping lives as long as a view of it does."""

    def __init__(self, path: Path) -> None:
        """Open and check `path`; raise CheckpointError if any byte of the layout is off."""
        self.path = path
        self._map, self._size = _map_file(path)
        self._data_start, entries = self._read_header()
        self._offsets: dict[str, int] = {}
        self.infos: dict[str, TensorInfo] = {}
        spans: list[tuple[int, int, str]] = []
        for key, entry in entries.items():
            begin, end = self._add_entry(key, entry)
            spans.append((begin, end, key))
        self._check_spans(spans)
        self._check_with_library()

    def get(self, key: str) -> HostTensor:
        """Return a read-only view of tensor `key`, which must be in `infos`."""
        info = self.infos[key]
        if self.path.stat().st_size < self._size:  # reading past the end would be SIGBUS
            raise CheckpointError(f"{self.path}: {key}: the file shrank while it was being read")
        dtype = DTYPES[info.dtype]
        count = math.prod(info.shape)
        flat = np.frombuffer(self._map, dtype, count, self._offsets[key])
        if not flat.flags.aligned:  # a writer that did not pad its header; the format allows it
            flat = flat.copy()
        return HostTensor(flat.reshape(info.shape), info.dtype, key, self.path)

    def release(self) -> None:
        """Give the resident pages of the mapping back; views stay valid and fault in again."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _read_header(self) -> tuple[int, dict[str, Any]]:
        if self._size < 8:
            state = "truncated" if self._size else "empty"
            raise self._error(f"found {self._size} bytes, expected at least 8: the file is {state}")
        refuse_pointer(self.path, self._map[:64])
        length = int.from_bytes(self._map[:8], "little")
        if length > _LARGEST_HEADER:
            raise self._error(
                f"header of {length} bytes, expected at most {_LARGEST_HEADER}:"
                " not a safetensors file"
            )
        if 8 + length > self._size:
            raise self._error(
                f"header of {length} bytes, but the file has {self._size}: the file is truncated"
            )
        try:
            header = json.loads(self._map[8 : 8 + length], object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise self._error(f"header is not readable as JSON: {error}") from None
        if not isinstance(header, dict):
            raise self._error(f"header: found {quote(header)}, expected a JSON object")
        header.pop("__metadata__", None)  # the library checks its shape
        return 8 + length, header

    def _add_entry(self, key: str, entry: object) -> tuple[int, int]:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._error(f"{key}: header entry {quote(entry)} is not a tensor description")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._error(f"{key}: found dtype {quote(dtype)}, expected {', '.join(DTYPES)}")
        if not _is_sizes(shape) or len(shape) > 32:
            raise self._error(f"{key}: found shape {quote(shape)}, expected non-negative integers")
        if not _is_sizes(offsets) or len(offsets) != 2:
            raise self._error(f"{key}: found data_offsets {quote(offsets)}, expected [begin, end]")
        begin, end = offsets
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        if end - begin != nbytes:
            raise self._error(
                f"{key}: found {end - begin} bytes of data, expected {nbytes} for {dtype} {shape}"
            )
        if math.prod(max(size, 1) for size in shape) > _MOST_ELEMENTS:  # numpy has no such shape
            raise self._error(f"{key}: found shape {quote(shape)}, expected fewer elements")
        if self._data_start + end > self._size:
            raise self._error(
                f"{key}: data end at byte {self._data_start + end}, but the file has {self._size}:"
                " the file is truncated"
            )
        self.infos[key] = TensorInfo(key, dtype, tuple(shape), nbytes, self.path)
        self._offsets[key] = self._data_start + begin
        return begin, end

    def _check_spans(self, spans: list[tuple[int, int, str]]) -> None:
        at = 0
        for begin, end, key in sorted(spans):
            if begin != at:
                fault = "overlap the tensor before" if begin < at else f"leave a gap after {at}"
                raise self._error(f"{key}: data at [{begin}, {end}] {fault}")
            at = end
        if self._data_start + at != self._size:
            extra = self._size - self._data_start - at
            raise self._error(f"{extra} bytes after the last tensor, expected none")

    def _check_with_library(self) -> None:
        try:
            with safe_open(str(self.path), framework="np"):
                pass
        except (SafetensorError, OSError, ValueError) as error:
            raise self._error(f"refused by the safetensors library: {error}") from None

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")


def _map_file(path: Path) -> tuple[mmap.mmap, int]:
    """Map `path` read-only; an empty file gives one anonymous zero page and size 0."""
    check_regular(path, 1 << 62)  # opening a named pipe would wait for ever
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return mmap.mmap(-1, 1), 0
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), size
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CheckpointError(f"{path}: cannot be opened: {error}") from None


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 62 for i in value
    )
