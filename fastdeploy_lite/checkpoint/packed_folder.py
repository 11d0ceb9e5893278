"""What a folder of packed weights holds, and what of it no start has read for long.

A file is never wrong, only useless: its checkpoint, its options or this program may have changed,
and it is as large as the weights. The time of a file is that of its last use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastdeploy_lite.checkpoint.packed_file import PARTIAL_SUFFIX

_NAME = re.compile(
    r"(?P<model>.+)-(?P<fingerprint>[0-9a-f]{24})\.rank(?P<rank>[0-9]+)of(?P<ranks>[0-9]+)"
    rf"\.safetensors(?P<partial>{re.escape(PARTIAL_SUFFIX)})?"
)


@dataclass(frozen=True)
class PackedEntry:
    """One file.

    Attributes:
        path: Where it is.
        model: Name of the model's folder.
        rank, ranks: Whose weights it holds.
        nbytes: Its size.
        used: When it was last read or written, seconds since the epoch.
        is_partial: It is being written, or its writer was killed.
    """

    path: Path
    model: str
    rank: int
    ranks: int
    nbytes: int
    used: float
    is_partial: bool


def file_name(model: str, fingerprint: str, rank: int, ranks: int) -> str:
    """Name of the file of one rank; `fingerprint` has 24 hexadecimal digits."""
    return f"{model}-{fingerprint}.rank{rank}of{ranks}.safetensors"


def list_packed(folder: Path) -> list[PackedEntry]:
    """Files of packed weights in a folder, the one that was used last first; no links.

    Raises:
        OSError: The folder cannot be read.
    """
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        with contextlib.suppress(FileNotFoundError):  # another process has just renamed it
            status = path.lstat()
            if match is not None and stat.S_ISREG(status.st_mode):
                rank, ranks = int(match["rank"]), int(match["ranks"])
                size, used, partial = status.st_size, status.st_mtime, match["partial"] is not None
                found.append(PackedEntry(path, match["model"], rank, ranks, size, used, partial))
    return sorted(found, key=lambda entry: (-entry.used, entry.path.name))


def older_files(path: Path) -> list[PackedEntry]:
    """Other files of the same model and rank as `path`; none where the folder cannot be read."""
    match = _NAME.fullmatch(path.name)
    with contextlib.suppress(OSError):
        return [
            entry
            for entry in list_packed(path.parent)
            if match is not None
            and (entry.model, entry.rank, entry.ranks)
            == (match["model"], int(match["rank"]), int(match["ranks"]))
            and entry.path.name.removesuffix(PARTIAL_SUFFIX) != path.name
        ]
    return []


def delete(entries: Sequence[PackedEntry]) -> list[PackedEntry]:
    """Delete files; a process that has one open goes on reading it, one that writes one keeps it.

    Returns:
        Those that were deleted.

    Raises:
        OSError: One cannot be deleted.
    """
    return [entry for entry in entries if _delete(entry)]


def _delete(entry: PackedEntry) -> bool:
    with contextlib.ExitStack() as stack:
        if entry.is_partial:
            try:
                file = os.open(entry.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
            stack.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False  # its writer lives
        entry.path.unlink(missing_ok=True)
        return True
