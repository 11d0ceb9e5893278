"""A file of arrays that were made from a checkpoint: kept for the next start, never trusted.

It is a safetensors file, so that other tools can look into it. Its last tensor, `checksums`, has a
CRC-32C of each 256 KiB of every other one and, at the very end, that of the header. A file is
written beside its name, brought to the disk and then renamed, by one process at a time; a reader
holds the file that it has opened, whatever happens to the name. It reads into memory of its own, or
maps the file, which then must not be cut short.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.utils.arrays import Array
from fastdeploy_lite.utils.errors import CheckpointError

FORMAT = "fastdeploy-lite packed weights"
VERSION = 1
PARTIAL_SUFFIX = ".partial"
_CHECKSUMS = "checksums"
ALIGNMENT = 64  # bytes, of arrays in the file
_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_WRITTEN_AT_ONCE = 64 << 20

Sums = npt.NDArray[np.int32]


class PackedFileError(CheckpointError):
    """The file is not what was written, or cannot be read; nothing of it may be used."""


class PackedFile:
    """An open file whose header is as it was written; close it, or use it as a context manager."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Open `path` and check everything but the data.

        Args:
            path: the file itself; a link is refused.
            fingerprint: as it was written.

        Raises:
            FileNotFoundError: there is none.
            PackedFileError: it cannot be read, is damaged, or was made of something else.
        """
        self.path = path
        self._map: mmap.mmap | None = None
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path)) from None
        except OSError as error:
            raise self._error(_reason(error)) from None
        try:
            self._read_header(fingerprint)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            self.close()
            if isinstance(error, PackedFileError):
                raise
            raise self._error(f"a header that was not written here ({error!r})") from None

    def __enter__(self) -> PackedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def mark_used(self) -> None:
        """Set the file's time to now, if it may be: what nobody uses can be told by it."""
        with contextlib.suppress(OSError):
            os.utime(self._file)

    def __contains__(self, name: str) -> bool:
        return name in self._spans

    def nbytes(self, name: str) -> int:
        """Bytes of an array; PackedFileError if it is not there."""
        begin, end = self._span(name)
        return end - begin

    def read(self, name: str, out: Array) -> None:
        """Fill `out`, which has no gaps, with an array on all threads, and check every byte.

        Raises:
            PackedFileError: the array has another size, is damaged, or cannot be read.
        """
        begin, end = self._span(name)
        if end - begin != out.nbytes:
            raise self._error(f"{name}: found {end - begin} bytes, expected {out.nbytes}")
        sums = _no_sums(out)
        failed = _ops_cpu.read_checked(self._file, begin, _view(out), _view(sums))
        if failed:
            raise self._error(f"{name}: {_reason(OSError(failed, os.strerror(failed)))}")
        self._compare(name, begin, sums)

    def _compare(self, name: str, begin: int, sums: Sums) -> None:
        first = self._first_sum[name]
        wrong = np.flatnonzero(sums != self._sums[first : first + len(sums)])
        if len(wrong):
            at = begin + int(wrong[0]) * _ops_cpu.CHECKSUM_BYTES
            raise self._error(f"{name}: damaged in the {_ops_cpu.CHECKSUM_BYTES} bytes from {at}")

    def map(self, name: str) -> Array:
        """Return an array as a mapping of the file, checked byte by byte; nobody may write to it.

        It outlives this object. A file that is cut short later ends the process that reads it.

        Raises:
            PackedFileError: as `read`.
        """
        begin, end = self._span(name)
        found = self._mapped(begin, end - begin)
        sums = _no_sums(found)
        _ops_cpu.checksums(_view(found), _view(sums))
        self._compare(name, begin, sums)
        return found

    def _mapped(self, begin: int, count: int) -> Array:
        """Bytes of the file; DLPack wants them to look writable."""
        if self._map is None:
            self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        if os.fstat(self._file).st_size < begin + count:
            raise self._error("cut short")
        whole: Array = np.frombuffer(self._map, np.uint8)
        address = whole.__array_interface__["data"][0] + begin
        memory = (ctypes.c_uint8 * count).from_address(address)
        memory.owner = whole  # type: ignore[attr-defined]
        found: Array = np.frombuffer(memory, np.uint8)  # type: ignore[call-overload]
        return found

    def _span(self, name: str) -> tuple[int, int]:
        span = self._spans.get(name)
        if span is None:
            raise self._error(f"{name}: not there")
        return span

    def _read_header(self, fingerprint: str) -> None:
        found = os.fstat(self._file)
        if not stat.S_ISREG(found.st_mode):
            raise self._error("found something that is not a regular file")
        head = self._bytes(0, 8)
        length = int.from_bytes(head, "little")
        if length > min(_LARGEST_HEADER, found.st_size - 12):
            raise self._error(f"not a file of this kind, or cut short at {found.st_size} bytes")
        head += self._bytes(8, length)
        expected = self._bytes(found.st_size - 4, 4)
        if _crc(head) != np.frombuffer(expected, np.int32)[0]:
            raise self._error("not a file of this kind, cut short, or damaged in its header")
        header = json.loads(head[8:])
        metadata = header.pop("__metadata__")
        for key, wanted in _identity(fingerprint).items():
            if metadata.get(key) != wanted:
                raise self._error(f"{key} is {metadata.get(key)!r}, expected {wanted!r}")
        self.contents: Any = json.loads(metadata["contents"])
        start = len(head)
        offsets = {name: entry["data_offsets"] for name, entry in header.items()}
        begin, end = offsets.pop(_CHECKSUMS)
        if start + end != found.st_size:
            raise self._error(f"found {found.st_size} bytes, expected {start + end}")
        self._sums: Sums = np.frombuffer(self._bytes(start + begin, end - begin), np.int32)
        self._spans: dict[str, tuple[int, int]] = {}
        self._first_sum: dict[str, int] = {}
        count = 0
        for name, (first, last) in offsets.items():
            self._spans[name] = (start + first, start + last)
            self._first_sum[name] = count
            count += _count_sums(last - first)
        self.total_nbytes = begin

    def _bytes(self, offset: int, count: int) -> bytes:
        try:
            found = os.pread(self._file, count, offset) if offset >= 0 else b""
        except OSError as error:
            raise self._error(_reason(error)) from None
        if len(found) != count:
            raise self._error("not a file of this kind, or cut short")
        return found

    def _error(self, message: str) -> PackedFileError:
        return PackedFileError(f"{self.path}: {message}")


def write_packed_file(
    path: Path,
    fingerprint: str,
    contents: Any,
    arrays: Mapping[str, Array],
    check: Callable[[], None] | None = None,
) -> bool:
    """Write a file that `PackedFile` reads, and give it its name when it is complete.

    Args:
        path: its name; what has it is replaced, also a link (not what the link names).
        fingerprint: of what the arrays were made from.
        contents: plain data to keep beside them.
        arrays: without gaps, in the order in which they will be read.
        check: called now and then; what it raises ends the writing.

    Returns:
        Whether it was written; False while another process writes it.

    Raises:
        OSError: the folder cannot be had, or has too little room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = _aligned(arrays)
    header = _header(fingerprint, contents, arrays)
    needed = len(header) + sum(array.nbytes for array in arrays.values())
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with _own(partial) as file:
        if file is None:
            return False
        try:
            _check_room(path.parent, needed)
            _write(file, header, arrays, check)
            os.fsync(file)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)
    return True


@contextlib.contextmanager
def _own(partial: Path) -> Iterator[int | None]:
    """An empty file that no other process writes meanwhile; None if one does.

    The lock goes with its process, so that the file of one that was killed is simply used again.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(partial, flags, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(partial))
        if not _is_named(partial, found):
            yield None  # another process has finished it between the two calls above
            return
        os.ftruncate(file, 0)
        yield file
    finally:
        os.close(file)


def _is_named(path: Path, found: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.lstat(), found)
    except FileNotFoundError:
        return False


def _check_room(folder: Path, needed: int) -> None:
    """Say so before gigabytes are written in vain."""
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} are free",
            str(folder),
        )


def _aligned(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """With zeros in between, since safetensors allows no gaps: each array begins at a cache line,
    which is what a mapped one needs to be read at full speed."""
    found: dict[str, Array] = {}
    for i, (name, array) in enumerate(arrays.items()):
        found[name] = array
        if array.nbytes % ALIGNMENT:
            found[f"padding {i}"] = np.zeros(-array.nbytes % ALIGNMENT, np.uint8)
    return found


def _header(fingerprint: str, contents: Any, arrays: Mapping[str, Array]) -> bytes:
    metadata = {**_identity(fingerprint), "contents": json.dumps(contents)}
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, array in arrays.items():
        header[name] = _entry("U8", array.nbytes, at, array.nbytes)
        at += array.nbytes
    count = sum(_count_sums(array.nbytes) for array in arrays.values()) + 1
    header[_CHECKSUMS] = _entry("U32", count, at, 4 * count)
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _entry(dtype: str, count: int, at: int, nbytes: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [count], "data_offsets": [at, at + nbytes]}


def _identity(fingerprint: str) -> dict[str, str]:
    return {"format": FORMAT, "version": str(VERSION), "fingerprint": fingerprint}


def _write(
    file: int, header: bytes, arrays: Mapping[str, Array], check: Callable[[], None] | None
) -> None:
    sums = []
    with open(file, "wb", closefd=False) as out:
        out.write(header)
        for array in arrays.values():
            flat = array.reshape(-1).view(np.uint8)
            for start in range(0, len(flat), _WRITTEN_AT_ONCE):
                if check is not None:
                    check()
                out.write(flat[start : start + _WRITTEN_AT_ONCE].data)
            sums.append(_no_sums(array))
            _ops_cpu.checksums(_view(array), _view(sums[-1]))
        sums.append(np.array([_crc(header)], np.int32))
        out.write(np.concatenate(sums).data)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _count_sums(nbytes: int) -> int:
    return -(-nbytes // _ops_cpu.CHECKSUM_BYTES)


def _no_sums(array: Array) -> Sums:
    return np.empty(_count_sums(array.nbytes), np.int32)


def _crc(data: bytes) -> int:
    """CRC-32C of up to 256 KiB; of more, that of the bytes of the pieces' sums."""
    array = np.frombuffer(data, np.uint8)
    while True:
        sums = _no_sums(array)
        _ops_cpu.checksums(_view(array), _view(sums))
        if len(sums) == 1:
            return int(sums[0])
        array = sums.view(np.uint8)


def _view(array: Array) -> _ops_cpu.View:
    """Of all bytes, or of the numbers of int32."""
    flat = array.reshape(-1)
    if flat.dtype != np.int32:
        flat = flat.view(np.uint8)
    return flat.__array_interface__["data"][0], flat.dtype.name, [len(flat)], [1]


def _reason(error: OSError) -> str:
    if error.errno == errno.ENODATA:
        return "cut short"
    if error.errno == errno.ELOOP:
        return "a link, expected the file itself"
    return error.strerror or str(error)
