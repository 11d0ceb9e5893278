"""Files of a model folder: what small ones must be, and which one a failed write was of.

A folder may hold a named pipe that never ends, a sparse file of terabytes or the pointer that Git
LFS leaves in place of a large file; each is one line that says so.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path

from fastdeploy_lite.utils.errors import CheckpointError, quote

LARGEST_TEXT = 16 << 20
"""Bytes of a chat template or a configuration; real ones have a few thousand."""
_LFS = b"version https://git-lfs.github.com/"


def is_there(path: Path) -> bool:
    """Whether a folder holds a file; a link to nothing is a damaged one, not none."""
    return path.exists() or path.is_symlink()


def check_regular(path: Path, largest: int) -> None:
    """Raise CheckpointError unless `path` is a regular file of at most `largest` bytes."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        if path.is_symlink():
            reason = f"a link to {quote(str(path.readlink()))}, which cannot be followed ({reason})"
        raise CheckpointError(f"{path}: {reason}") from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: found something that is not a regular file")
    if found.st_size > largest:
        raise CheckpointError(f"{path}: found {found.st_size} bytes, expected at most {largest}")


def read_small(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """Return the bytes of a small file; CheckpointError if it is something else."""
    check_regular(path, largest)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    refuse_pointer(path, data)
    return data


def refuse_pointer(path: Path, head: bytes) -> None:
    """Raise CheckpointError if a file that begins with `head` is only a Git LFS pointer."""
    if head.startswith(_LFS):
        raise CheckpointError(
            f"{path}: this is a Git LFS pointer, not the file: run `git lfs pull` in the folder,"
            " or download the file again"
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let errors say which file could not be written: that of a full disk names none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
