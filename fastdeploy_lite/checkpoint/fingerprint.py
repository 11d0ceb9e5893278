"""Whether the files of a model folder are still those of the last start, without reading them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fastdeploy_lite.utils.errors import CheckpointError

_PATTERNS = ("*.safetensors", "*.pdparams", "*.index.json")
_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


def folder_state(root: Path) -> str:
    """Return a digest of the names, sizes, times of change and headers of all weight files.

    Equal digests mean the same weights unless somebody changed bytes and set the time back.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    folders = [root, *sorted(root.glob("rank*"))]
    paths = [path for folder in folders for form in _PATTERNS for path in sorted(folder.glob(form))]
    try:
        for path in paths:
            found = path.stat()
            line = [str(path.relative_to(root)), found.st_size, found.st_mtime_ns]
            digest.update(json.dumps(line).encode())
            if path.suffix == ".safetensors":
                digest.update(_header(path))
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from None
    return digest.hexdigest()


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, _LARGEST_HEADER))
