"""Write a checkpoint folder tensor by tensor, never holding more than one.

A safetensors header stands before the data and is only known when a shard is full, so data go to a
temporary file first and the shard is assembled from header and data when it is closed. Nothing has
its final name before `close`: an interrupted run leaves no folder that looks complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from fastdeploy_lite.checkpoint.tensor import DTYPES, Array
from fastdeploy_lite.utils.errors import CheckpointError
from fastdeploy_lite.utils.files import writing

_ALIGNMENT = 8  # safetensors: data start at a multiple of this, the header is padded with spaces
PARTIAL_SUFFIX = ".partial"


class CheckpointWriter:
    """Writes `config.json` and sharded safetensors with an index (one shard: a single file).

    Use it as a context manager: an exception removes what was written.
    """

    def __init__(
        self,
        directory: str | Path,
        config: Mapping[str, Any] | None,
        shard_bytes: int = 4 << 30,
    ) -> None:
        """Make `directory`; `config` None writes no config.json (a `rank{r}/` folder).

        A shard is closed when the next tensor would bring it over `shard_bytes`. Raises
        CheckpointError if the folder holds weights already.
        """
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_partial()  # left by a run that was killed
        old = next(self.directory.glob("*.safetensors*"), None)
        if old is not None:
            raise CheckpointError(f"{old}: the output folder already holds weights")
        self._config = None if config is None else dict(config)
        self._shard_bytes = shard_bytes
        self._finished: list[Path] = []
        self._weight_map: dict[str, int] = {}
        self._total = 0
        self._entries: dict[str, dict[str, Any]] = {}
        self._data: BinaryIO | None = None

    def add(self, key: str, array: Array, dtype: str) -> None:
        """Append one tensor. `dtype` is the safetensors name; `array` holds its bits.

        BF16 takes uint16 bits; other arrays must have the matching numpy type.
        """
        if key in self._weight_map:
            raise CheckpointError(f"{self.directory}: {key}: written twice")
        expected = DTYPES.get(dtype)
        if expected is None or array.dtype != expected:
            raise CheckpointError(f"{key}: {dtype} cannot be written from {array.dtype} values")
        data = np.ascontiguousarray(array)
        offset = self._data.tell() if self._data is not None else 0
        if self._entries and offset + data.nbytes > self._shard_bytes:
            self._finish_shard()
            offset = 0
        path = self._path(len(self._finished), "data")
        if self._data is None:
            self._data = path.open("w+b")
        with writing(path):
            self._data.write(data.reshape(-1).view(np.uint8).data)
        self._entries[key] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + data.nbytes],
        }
        self._weight_map[key] = len(self._finished)
        self._total += data.nbytes

    def close(self) -> None:
        """Finish the last shard, then rename the shards, the index and config.json into place."""
        if not self._weight_map:
            raise CheckpointError(f"{self.directory}: no tensor was written")
        if self._entries:
            self._finish_shard()
        count = len(self._finished)
        names = (
            ["model.safetensors"]
            if count == 1
            else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        for path, name in zip(self._finished, names, strict=True):
            path.replace(self.directory / name)
        if count > 1:
            index = {
                "metadata": {"total_size": self._total},
                "weight_map": {key: names[i] for key, i in sorted(self._weight_map.items())},
            }
            self._write_json("model.safetensors.index.json", index)
        if self._config is not None:  # last: a folder without it is not taken for a model
            self._write_json("config.json", self._config)
        self._finished.clear()

    def discard(self) -> None:
        """Remove everything that this writer has put into the folder."""
        if self._data is not None:
            with contextlib.suppress(OSError):  # what waits to be written may not fit either
                self._data.close()
            self._data = None
        self._remove_partial()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _remove_partial(self) -> None:
        for path in self.directory.glob(f"*{PARTIAL_SUFFIX}"):
            path.unlink()

    def _path(self, shard: int, what: str) -> Path:
        return self.directory / f"model-{shard:05d}.{what}{PARTIAL_SUFFIX}"

    def _finish_shard(self) -> None:
        """Assemble header and data of the current shard in a temporary file."""
        assert self._data is not None
        header = json.dumps({"__metadata__": {"format": "np"}, **self._entries}).encode()
        header += b" " * (-len(header) % _ALIGNMENT)
        path = self._path(len(self._finished), "safetensors")
        with writing(path), path.open("wb") as file:
            self._data.seek(0)  # writes what is left
            file.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(self._data, file, 16 << 20)
            file.flush()
            os.fsync(file.fileno())
        self._data.close()
        self._data = None
        self._path(len(self._finished), "data").unlink()
        self._finished.append(path)
        self._entries = {}

    def _write_json(self, name: str, value: object) -> None:
        write_json(self.directory / name, value)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file under its name once it is complete."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with writing(partial):
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
