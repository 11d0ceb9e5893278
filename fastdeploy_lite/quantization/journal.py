"""What a long conversion has done so far, so that a killed one goes on where it was.

A folder beside the output holds `settings.json` and, for every finished layer, its tensors and a
record with their SHA-256; for one of the last, a state too (whatever the layer after it needs): a
run goes on after that one. A layer counts only if its record is there and the sums agree; the
record is renamed into place last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fastdeploy_lite.utils.arrays import Array
from fastdeploy_lite.utils.errors import ConfigError
from fastdeploy_lite.utils.files import writing

FileTensor: TypeAlias = tuple[Array, str]
"""Bits of a tensor and its safetensors dtype."""


_SETTINGS, _PARTIAL = "settings.json", ".partial"
NOTES_FILE = "sensitivity.json"
"""May be there before the settings are known: these depend on it."""


@dataclass
class LayerResult:
    """Tensors of one layer by key, what the next layer needs, and figures for the report."""

    tensors: dict[str, FileTensor]
    state: dict[str, Array] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


class Journal:
    """Finished layers of one conversion with one set of settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open `folder` or begin it.

        Raises:
            ConfigError: it was begun with other settings; names the first that differs. Or it is
                somebody else's: `remove` would delete what is not ours.
        """
        check_folder(folder)
        self.folder = folder
        wanted = json.loads(json.dumps(dict(settings)))
        file = folder / _SETTINGS
        if file.exists():
            _compare(_read_settings(file), wanted, folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            _write_text(file, json.dumps(wanted, indent=1))

    def load(self, layer: int) -> LayerResult | None:
        """Return a finished layer; None if it is not there, incomplete or damaged."""
        record_file = self._path(layer, "json")
        if not record_file.exists():
            return None
        try:
            record = json.loads(record_file.read_text(encoding="utf-8"))
            arrays = {name: self._read(layer, name, record) for name in ("tensors", "state")}
            tensors = {
                key: (arrays["tensors"][str(index)], dtype)
                for index, (key, dtype) in enumerate(record["keys"])
            }
            return LayerResult(tensors, arrays["state"], record["figures"])
        except (ValueError, OSError, KeyError, TypeError):
            return None

    def finished(self, layer: int) -> tuple[dict[str, Any], bool] | None:
        """Return a finished layer's figures and whether its state is kept; None if it is not done.

        The sums are checked, but nothing is held: a model's tensors need not fit in memory.
        """
        found = self.load(layer)
        return None if found is None else (found.figures, bool(found.state))

    def save(self, layer: int, result: LayerResult) -> None:
        """Keep a finished layer, and its state if it has one."""
        packed = {str(i): array for i, (array, _) in enumerate(result.tensors.values())}
        state, state_file = None, self._path(layer, "state.npz")
        if result.state:
            state = _write_arrays(state_file, result.state)
        record = {
            "keys": [(key, dtype) for key, (_, dtype) in result.tensors.items()],
            "figures": result.figures,
            "tensors": _write_arrays(self._path(layer, "tensors.npz"), packed),
            "state": state,
        }
        _write_text(self._path(layer, "json"), json.dumps(record))
        if state is None:
            state_file.unlink(missing_ok=True)

    def forget_state(self, layer: int) -> None:
        """Drop the state of a finished layer: that of a later one is kept."""
        record = json.loads(self._path(layer, "json").read_text(encoding="utf-8"))
        _write_text(self._path(layer, "json"), json.dumps({**record, "state": None}))
        self._path(layer, "state.npz").unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder: the conversion is complete."""
        shutil.rmtree(self.folder)

    def _path(self, layer: int, what: str) -> Path:
        return self.folder / f"layer-{layer:05d}.{what}"

    def _read(self, layer: int, name: str, record: Mapping[str, Any]) -> dict[str, Array]:
        if record[name] is None:
            return {}
        path = self._path(layer, f"{name}.npz")
        if _digest(path) != record[name]:
            raise ValueError(f"{path} is damaged")
        with np.load(path) as file:
            return {key: file[key] for key in file.files}


def check_folder(folder: Path) -> None:
    """Raise ConfigError if a folder holds anything but an unfinished conversion."""
    if not folder.exists() or (folder / _SETTINGS).exists():
        return
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: found a file where finished layers wait: move it, or name another output"
        )
    found = next((p.name for p in sorted(folder.iterdir()) if p.suffix != _PARTIAL), None)
    if found not in (None, NOTES_FILE):
        raise ConfigError(
            f"{folder}: found {found} and no {_SETTINGS}, expected an unfinished conversion or "
            "nothing, since finished layers wait there: move it, or name another output"
        )


class Notes:
    """A value that took long to find, kept in a file beside what it was found of."""

    def __init__(self, path: Path, source: str) -> None:
        """`source`: digest of all that the value depends on."""
        self._path, self._source = path, source

    def read(self) -> Any:
        """Return the value; None if there is none, or it was found of something else."""
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return found["value"] if found["source"] == self._source else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, value: Any) -> None:
        """Keep the value."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _write_text(self._path, json.dumps({"source": self._source, "value": value}))


def _read_settings(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: damaged: delete its folder to begin anew")
    return found


def _compare(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise ConfigError(
                f"{folder}: begun with {name} {found.get(name)!r}, now {wanted.get(name)!r}: go on "
                "with the same settings, or delete this folder to begin anew"
            )


def _write_arrays(path: Path, arrays: Mapping[str, Array]) -> str:
    """Write an npz file; returns its digest."""
    with _complete(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return _digest(path)


def _write_text(path: Path, text: str) -> None:
    with _complete(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """A file to write that takes its name when it is complete, and goes when it cannot be."""
    partial = path.with_suffix(_PARTIAL)
    try:
        with writing(partial):
            yield partial
    except BaseException:
        partial.unlink(missing_ok=True)  # a full disk has better use for its room
        raise
    partial.replace(path)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
