"""Files of a model folder: what small ones must be, and which one a failed write was of.

A folder may hold a named pipe that never ends, a sparse file of terabytes or the pointer that Git
LFS leaves in place of a large file; each is one line that says so.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path

from fastdeploy_lite.utils.errors import CheckpointError, ConfigError, quote

LARGEST_TEXT = 16 << 20
"""Bytes of a chat template or a configuration; real ones have a few thousand."""
_LFS = b"version https://git-lfs.github.com/"


def is_there(path: Path) -> bool:
    """Whether a folder holds a file; a link to nothing is a damaged one, not none."""
    return path.exists() or path.is_symlink()


def check_readable(path: Path, wanted: str) -> None:
    """Refuse what no text can be read from; a pipe, such as a shell's `<(command)`, is a file.

    Args:
        path: Given by a user.
        wanted: What it should be, for the message.

    Raises:
        ConfigError: There is none, or it is a folder.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: found a folder, expected {wanted}")
    if not path.exists():
        raise ConfigError(f"{path}: no such file; name {wanted}")


def check_writable(path: str | Path, option: str) -> None:
    """Refuse before the work what its result could not be written to after it.

    Args:
        path: Of a file that is written anew, or of a pipe or device.
        option: That names it, for the message.

    Raises:
        ConfigError: It is a folder, or no file can be written there.
    """
    path = Path(path)
    is_new = not path.exists()
    if path.is_dir():
        raise ConfigError(f"{option} {path}: found a folder, expected a file")
    if not (is_new or path.is_file()):
        return
    try:
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}") from None


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
